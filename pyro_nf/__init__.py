"""Normalizing flows that live inside Pyro."""

__version__ = "0.1.0"
