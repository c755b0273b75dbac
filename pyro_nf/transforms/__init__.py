"""Invertible maps of events, as Pyro transforms and torch modules, and layers that are random."""

from pyro_nf.transforms.affine import FixedAffine, LowerAffine, LowRankAffine
from pyro_nf.transforms.autoregressive import (
    Autoregressive,
    affine_autoregressive,
    spline_autoregressive,
)
from pyro_nf.transforms.base import Conditioned, FlowTransform, Inverse
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.coupling import (
    Coupling,
    additive_coupling,
    affine_coupling,
    spline_coupling,
)
from pyro_nf.transforms.elementwise import (
    Elementwise,
    Exp,
    Fixed,
    LeakyReLU,
    Sigmoid,
    Softplus,
    Softsign,
    Tanh,
    spline,
)
from pyro_nf.transforms.linear import ActNorm, LULinear
from pyro_nf.transforms.permutation import Permutation
from pyro_nf.transforms.planar import Planar, Radial
from pyro_nf.transforms.stochastic import StochasticLayer, StochasticTransform
from pyro_nf.transforms.stochastic_chain import StochasticChain

__all__ = [
    "ActNorm",
    "Autoregressive",
    "Chain",
    "Conditioned",
    "Coupling",
    "Elementwise",
    "Exp",
    "Fixed",
    "FixedAffine",
    "FlowTransform",
    "Inverse",
    "LULinear",
    "LowRankAffine",
    "LowerAffine",
    "LeakyReLU",
    "Permutation",
    "Planar",
    "Radial",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "StochasticChain",
    "StochasticLayer",
    "StochasticTransform",
    "Tanh",
    "additive_coupling",
    "affine_autoregressive",
    "affine_coupling",
    "spline",
    "spline_autoregressive",
    "spline_coupling",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
