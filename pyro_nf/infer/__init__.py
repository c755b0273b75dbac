"""The door to inference: the flow guide, its fit, and the posterior that it gives."""

from pyro_nf.guides.guide import AutoFlow
from pyro_nf.guides.layers import affine_base
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.posterior.weights import Weights, smooth
from pyro_nf.search.start import GaussianStart, Start, laplace_start
from pyro_nf.vi.fit import SVIFit, fit_svi
from pyro_nf.vi.objectives import (
    ELBO,
    ForwardKL,
    ImportanceWeightedELBO,
    Reparameterised,
    StickTheLanding,
    TemperedELBO,
)

__all__ = [
    "AutoFlow",
    "ELBO",
    "ForwardKL",
    "GaussianStart",
    "ImportanceWeightedELBO",
    "LogJoint",
    "Posterior",
    "Recentre",
    "Reparameterised",
    "SVIFit",
    "Start",
    "StickTheLanding",
    "TemperedELBO",
    "Weights",
    "affine_base",
    "fit_svi",
    "laplace_start",
    "smooth",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
