"""Well-known networks that systems build on."""
