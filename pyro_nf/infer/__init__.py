"""The door to inference: the flow guide, its fit, and the posterior that it gives."""

import warnings

from pyro_nf.guides.guide import AutoFlow
from pyro_nf.guides.layers import affine_base
from pyro_nf.guides.recentre import Recentre
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.posterior.weights import Weights, smooth
from pyro_nf.search.start import GaussianStart, laplace_start
from pyro_nf.vi.fit import SVIFit, fit_svi
from pyro_nf.vi.gradients import Reparameterised, StickTheLanding
from pyro_nf.vi.objectives import ELBO, ForwardKL, ImportanceWeightedELBO, TemperedELBO
from pyro_nf.vi.recipe import PosteriorRecipe

__all__ = [
    "AutoFlow",
    "ELBO",
    "ForwardKL",
    "GaussianStart",
    "ImportanceWeightedELBO",
    "LogJoint",
    "Posterior",
    "PosteriorRecipe",
    "Recentre",
    "Reparameterised",
    "SVIFit",
    "StickTheLanding",
    "TemperedELBO",
    "Weights",
    "affine_base",
    "fit_svi",
    "laplace_start",
    "smooth",
]


def __getattr__(name: str) -> type[GaussianStart]:
    if name == "Start":
        message = "pyro_nf.infer.Start is now GaussianStart; pyro_nf.train.Start is another class."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return GaussianStart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
