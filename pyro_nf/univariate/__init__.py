"""Stateless increasing maps of one number."""

from pyro_nf.univariate.affine import Additive, Affine, SmoothAffine
from pyro_nf.univariate.base import UnivariateMap
from pyro_nf.univariate.fixed import Exp, LeakyReLU, Sigmoid, Softplus, Softsign, Tanh
from pyro_nf.univariate.sinh_arcsinh import SinhArcsinh
from pyro_nf.univariate.spline import RationalQuadratic

__all__ = [
    "Additive",
    "Affine",
    "Exp",
    "LeakyReLU",
    "RationalQuadratic",
    "Sigmoid",
    "SinhArcsinh",
    "Softplus",
    "SmoothAffine",
    "Softsign",
    "Tanh",
    "UnivariateMap",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
