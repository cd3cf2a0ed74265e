"""Nearest neighbours and communities."""
