"""Variational inference: objectives, stages, and the fit."""
