"""Graphs: structure, sparse kernels, layers, protocols, and the systems built on them."""
