"""Flows and their recipes."""
