"""Normalizing flows that live inside Pyro."""

from pyro_nf import flows, infer, train, transforms, univariate
from pyro_nf.flows.flow import Flow
from pyro_nf.infer.fit import fit_svi
from pyro_nf.infer.guide import AutoFlow
from pyro_nf.infer.posterior import Posterior

__version__ = "0.1.0"

__all__ = [
    "AutoFlow",
    "Flow",
    "Posterior",
    "fit_svi",
    "flows",
    "infer",
    "train",
    "transforms",
    "univariate",
]
