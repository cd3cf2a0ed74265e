"""Layers that at least two systems share."""
