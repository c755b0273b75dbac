"""Density estimation: a flow is fitted to rows, in memory or in batches."""

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

__all__ = [
    "AsGiven",
    "DensityFit",
    "DensityRecipe",
    "GaussianCopula",
    "MixtureBase",
    "Standardised",
    "Start",
    "StudentTails",
    "Whitened",
    "fit_density",
    "fit_gaussian_mixture",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
