"""Greedy tokens of every method, dtype, number of ranks and mode, against transformers: `make matrix`."""
