"""Random network models and processes on them."""
