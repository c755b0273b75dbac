"""Inference: the flow guide, its fit, and the posterior that it gives."""

from pyro_nf.infer.fit import SVIFit, fit_svi
from pyro_nf.infer.guide import AutoFlow
from pyro_nf.infer.joint import LogJoint
from pyro_nf.infer.objectives import (
    ELBO,
    ForwardKL,
    ImportanceWeightedELBO,
    Reparameterised,
    StickTheLanding,
    TemperedELBO,
)
from pyro_nf.infer.posterior import Posterior
from pyro_nf.infer.recentre import Recentre
from pyro_nf.infer.recipe import affine_base
from pyro_nf.infer.start import Start, laplace_start
from pyro_nf.infer.weights import Weights, smooth

__all__ = [
    "AutoFlow",
    "ELBO",
    "ForwardKL",
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
