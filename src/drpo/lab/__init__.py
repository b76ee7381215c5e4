"""Comparisons of runs: the grid, the worker pool, statistics over seeds; and replay of recorded batches."""
