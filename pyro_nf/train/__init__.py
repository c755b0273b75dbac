"""Training: the one loop, its checkpoints, and density estimation."""

from pyro_nf.train.baselines import GaussianCopula, fit_gaussian_mixture
from pyro_nf.train.density import DensityFit, fit_density
from pyro_nf.train.loop import History, Minibatches, Stage, adam, train, warm_cosine
from pyro_nf.train.start import (
    AsGiven,
    MixtureBase,
    Standardised,
    Start,
    StudentTails,
    Whitened,
)

__all__ = [
    "AsGiven",
    "DensityFit",
    "GaussianCopula",
    "History",
    "Minibatches",
    "MixtureBase",
    "Stage",
    "Standardised",
    "Start",
    "StudentTails",
    "Whitened",
    "adam",
    "fit_density",
    "fit_gaussian_mixture",
    "train",
    "warm_cosine",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
