"""The lab: which trust region holds, where. Comparisons of runs, problems small enough to solve exactly, statistics."""
