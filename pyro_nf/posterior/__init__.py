"""Draws of a fitted posterior, and what may be said of them."""
