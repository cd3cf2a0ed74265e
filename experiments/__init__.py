"""Runnable studies, one script per system."""
