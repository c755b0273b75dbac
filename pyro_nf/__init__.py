"""Normalizing flows that live inside Pyro."""

from pyro_nf import flows, infer, nn, plots, testing, train, transforms, univariate
from pyro_nf.flows.flow import Flow
from pyro_nf.guides.guide import AutoFlow
from pyro_nf.posterior.posterior import Posterior
from pyro_nf.train.density.fit import fit_density
from pyro_nf.vi.fit import fit_svi

__version__ = "0.1.0"

__all__ = [
    "AutoFlow",
    "Flow",
    "Posterior",
    "fit_density",
    "fit_svi",
    "flows",
    "infer",
    "nn",
    "plots",
    "testing",
    "train",
    "transforms",
    "univariate",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]
