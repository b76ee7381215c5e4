"""How often intervals hold what they promise, by simulation: with few seeds, not as often as their name says."""

from collections.abc import Callable, Mapping

import numpy as np

from drpo.errors import InputError
from drpo.lab.statistics import Interval, Strata, iqm, rate, stratified_interval, t_interval

LAWS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, n: generator.normal(size=n),
    "skewed": lambda generator, n: generator.lognormal(sigma=1.0, size=n),
}
"""What a seed's result may look like: normal, or log-normal with sigma 1 (skewness 6.2)."""

INTERVALS: Mapping[str, tuple[Callable[[Strata, int], Interval], Callable[..., object]]] = {
    "mean, bootstrap": (lambda strata, i: stratified_interval(strata, np.mean, resamples=1000, seed=i), np.mean),
    "mean, t": (lambda strata, i: t_interval(strata), np.mean),
    "iqm, bootstrap": (lambda strata, i: stratified_interval(strata, iqm, resamples=1000, seed=i), iqm),
}
"""How an interval is made of strata, and the statistic whose true value it should hold."""


def coverage(interval: str, law: str, seeds: int, strata: int = 1, repeats: int = 4000, seed: int = 0) -> Interval:
    """Return in what share of simulated comparisons a nominal 95 % interval holds the true value.

    Stratum h lies h standard deviations above the first. The true value is that of a million draws of each stratum;
    with fewer than 4 values in all the interquartile mean is the mean, and so is its true value.

    Args:
        interval: of `INTERVALS`.
        law: of `LAWS`.
        seeds: per stratum, at least 2.
        strata: how many.
        repeats: simulated comparisons.
        seed: of the simulation.

    Returns:
        The share, with Wilson's interval; 0.95 would be honest.

    Raises:
        InputError: fewer than 2 seeds, of which no interval can be made.

    Example:
        >>> found = coverage("mean, t", "normal", seeds=3, repeats=400)
        >>> found.low < 0.95 < found.high
        True
    """
    if seeds < 2:
        raise InputError(f"seeds={seeds}: must be at least 2")
    make, statistic = INTERVALS[interval]
    generator = np.random.default_rng(seed)
    many = LAWS[law](generator, 1_000_000)
    spread = many.std()
    everything = np.concatenate([many + h * spread for h in range(strata)])
    truth = float(np.mean(everything) if seeds * strata < 4 else statistic(everything))  # type: ignore[arg-type]
    held = []
    for i in range(repeats):
        found = make([list(LAWS[law](generator, seeds) + h * spread) for h in range(strata)], i)
        held.append(found.low <= truth <= found.high)
    return rate(held)
