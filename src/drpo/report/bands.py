"""Curves of several seeds as one: their mean at every step, and a band around it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

MOST_STEPS = 400
"""More points than a screen has columns for; of a longer curve every k-th step is shown."""
Floats = NDArray[np.float64]
Band = tuple[Floats, Floats, Floats]
"""Mean, lower and upper bound at each step, [T] each; nan where there is none."""


def rounded(values: Floats) -> list[float]:
    """Return numbers to five digits: more cannot be seen."""
    return [float(f"{x:.5g}") for x in values]


def over_seeds(curves: Sequence[Sequence[float | None]], n_steps: int) -> Floats:
    """Return curves as [S, n_steps]: nan where one has no finite number, or has ended.

    Example:
        >>> over_seeds([[0.5, None], [1.0]], 2)
        array([[0.5, nan],
               [1. , nan]])
    """
    found = np.full((len(curves), n_steps), np.nan)
    for row, curve in zip(found, curves, strict=True):
        row[: len(curve)] = [np.nan if x is None else x for x in curve]
    found[~np.isfinite(found)] = np.nan
    return found


def student(values: Floats, level: float = 0.95) -> Band:
    """Return the mean over seeds with Student's interval, step by step: `statistics.t_interval` of every column.

    Args:
        values: [S, T], nan where a seed has no number.
        level: of confidence.

    Example:
        >>> [column.round(2).tolist() for column in student(np.array([[1.0], [2.0], [3.0]]))]
        [[2.0], [-0.48], [4.48]]
    """
    n = np.isfinite(values).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.nansum(values, 0) / n
        variance = np.nansum((values - mean) ** 2, 0) / (n - 1)
        half = stdtrit(n - 1, (1 + level) / 2) * np.sqrt(variance / n)
    half = np.where(n > 1, half, np.nan)
    return mean, mean - half, mean + half


def spread(values: Floats) -> Band:
    """Return the mean over seeds with the lowest and the highest of them, step by step.

    Example:
        >>> [column.tolist() for column in spread(np.array([[1.0, np.nan], [2.0, 3.0]]))]
        [[1.5, 3.0], [1.0, 3.0], [2.0, 3.0]]
    """
    seen = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.nansum(values, 0) / seen.sum(0)
    some = seen.any(0)
    low = np.where(some, np.where(seen, values, np.inf).min(0, initial=np.inf), np.nan)
    high = np.where(some, np.where(seen, values, -np.inf).max(0, initial=-np.inf), np.nan)
    return mean, low, high


def shown_steps(n: int, most: int = MOST_STEPS) -> list[int]:
    """Return which of n steps are shown, from 0: all, or every k-th, and the last one always.

    Example:
        >>> shown_steps(3), shown_steps(10, most=4)
        ([0, 1, 2], [0, 3, 6, 9])
        >>> shown_steps(11, most=4)
        [0, 3, 6, 9, 10]
    """
    kept = list(range(0, n, -(-n // most))) if n else []
    return kept if not kept or kept[-1] == n - 1 else [*kept, n - 1]
