"""Conditioners: networks that compute the parameters of a transform."""

from pyro_nf.nn.conv import ConvNet
from pyro_nf.nn.mlp import MLP, Constant

__all__ = ["MLP", "Constant", "ConvNet"]


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
