"""Guides whose latents follow a flow."""
