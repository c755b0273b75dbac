"""Flows, and the recipes that make the classic ones."""

from pyro_nf.flows.base import Base, DiagonalNormal
from pyro_nf.flows.distribution import FlowDistribution
from pyro_nf.flows.flow import Flow
from pyro_nf.flows.mixture import GaussianMixture
from pyro_nf.flows.recipes import gaussian, glow, iaf, maf, nice, nsf, planar, realnvp
from pyro_nf.flows.stochastic import StochasticFlowDistribution
from pyro_nf.flows.student import StudentT

__all__ = [
    "Base",
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "GaussianMixture",
    "StochasticFlowDistribution",
    "StudentT",
    "gaussian",
    "glow",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "realnvp",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
