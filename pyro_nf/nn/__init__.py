"""Conditioners: networks that compute the parameters of a transform."""

from pyro_nf.nn.mlp import MLP, Constant

__all__ = ["MLP", "Constant"]
