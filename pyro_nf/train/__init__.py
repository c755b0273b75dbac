"""Training: the one loop, its checkpoints, and density estimation."""

from pyro_nf.train.batches import Minibatches
from pyro_nf.train.density.baselines import GaussianCopula, fit_gaussian_mixture
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.recipe import DensityFit, DensityRecipe
from pyro_nf.train.density.start import (
    AsGiven,
    MixtureBase,
    Standardised,
    Start,
    StudentTails,
    Whitened,
)
from pyro_nf.train.loop import train
from pyro_nf.train.stages import History, Stage, adam, warm_cosine

__all__ = [
    "AsGiven",
    "DensityFit",
    "DensityRecipe",
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
