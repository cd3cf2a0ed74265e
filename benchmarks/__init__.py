"""Timings beside a peer, one file per system."""
