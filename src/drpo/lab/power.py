"""What so many seeds can decide, computed before a study begins."""

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from drpo.lab.paired import barnard, blocks, equivalence, sign_flip_test, t_test

POWER = 0.8
"""The chance to find a difference that is there."""
_DRAWS = 500
_MOST_FLIPPED = 10  # seeds up to which sign flips are simulated; beyond, Student's power is nearly theirs


def detectable(seeds: int, level: float, test: str = "t", power: float = POWER) -> float | None:
    """Return the smallest difference that so many seeds find, in standard deviations of a seed's difference.

    Args:
        seeds: with a pair each, at least 2.
        level: of the test: the error rate over the number of comparisons, for the first of Holm's steps.
        test: "t" or "sign_flip".
        power: the chance to find it, if differences are normal.

    Returns:
        The difference; None if no difference, however large, is significant.

    Example:
        >>> round(detectable(5, 0.05), 2), detectable(5, 0.05, "sign_flip"), round(detectable(6, 0.05, "sign_flip"), 1)
        (1.68, None, 1.8)

    Source: of the t-test, J. Cohen, Statistical Power Analysis (1988).
    """
    if test == "sign_flip" and 2 / 2.0**seeds > level:
        return None
    if test == "t" or seeds > _MOST_FLIPPED:
        return _root(lambda a: _power_of_t(seeds, level, a) - power, seeds, level)
    noise = np.random.default_rng(0).normal(size=(_DRAWS, 1, seeds))
    return _root(lambda a: float((sign_flip_test(blocks(noise + a)) <= level).mean()) - power, seeds, level)


def _root(excess: Callable[[float], float], seeds: int, level: float) -> float:
    most = 2 * (float(stats.t.isf(level / 2, seeds - 1)) + 4) / math.sqrt(seeds)
    return float(optimize.bisect(excess, 0.0, most, xtol=0.005))


def _power_of_t(seeds: int, level: float, apart: float) -> float:
    """Return the power of the t-test: normal, given the spread; the mean over quantiles of the spread.

    `scipy.stats.nct` is nan far from 0.
    """
    quantiles = (np.arange(_DRAWS) + 0.5) / _DRAWS
    critical = stats.t.isf(level / 2, seeds - 1) * np.sqrt(stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1))
    center = apart * math.sqrt(seeds)
    return float((stats.norm.sf(critical - center) + stats.norm.cdf(-critical - center)).mean())


def equivalence_power(seeds: int, level: float, margin: float, test: str = "t") -> float:
    """Return the chance to find equivalence where there is no difference at all, if differences are normal.

    Args:
        seeds: with a pair each, at least 2.
        level: of each of the two one-sided tests.
        margin: in standard deviations of a seed's difference.
        test: "t" or "sign_flip".

    Example:
        >>> round(equivalence_power(5, 0.05, 1.0), 1), round(equivalence_power(20, 0.05, 1.0), 1)
        (0.3, 1.0)
    """
    noise = np.random.default_rng(0).normal(size=(_DRAWS, 1, seeds))
    exact = test == "sign_flip" and seeds <= _MOST_FLIPPED
    return float((equivalence(blocks(noise), margin, sign_flip_test if exact else t_test) <= level).mean())


def collapses_told_apart(seeds: int, level: float, test: str) -> int | None:
    """Return how many runs must collapse, where none of the other objective does, before the rates differ.

    Args:
        seeds: runs of each.
        level: of the test.
        test: "barnard" for runs of one regime, "sign_flip" for seeds over regimes.

    Returns:
        The number; None if even all would not do.

    Example:
        >>> collapses_told_apart(5, 0.05, "barnard"), collapses_told_apart(5, 0.05, "sign_flip")
        (4, None)
    """
    if test == "sign_flip":
        needed = math.ceil(math.log2(2 / level))
        return needed if needed <= seeds else None
    return next((k for k in range(1, seeds + 1) if barnard((0, k), (seeds, seeds)) <= level), None)
