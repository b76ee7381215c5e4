"""Comparisons of runs: their grid, the processes that train them, statistics over seeds; and recorded batches again."""
