"""Measures the coverage of confidence intervals by simulation: with few seeds it is below the nominal level."""

from collections.abc import Callable, Mapping

import numpy as np

from drpo.errors import InputError
from drpo.lab.statistics import Interval, Strata, iqm, rate, stratified_interval, t_interval
from drpo.train.evaluate import difference_interval

DISTRIBUTIONS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda generator, n: generator.normal(size=n),
    "skewed": lambda generator, n: generator.lognormal(sigma=1.0, size=n),
}
"""Distributions of a seed's result: normal, or log-normal with sigma 1 (skewness 6.2)."""

INTERVALS: Mapping[str, tuple[Callable[[Strata, int], Interval], Callable[..., object]]] = {
    "mean, bootstrap": (lambda strata, i: stratified_interval(strata, np.mean, resamples=1000, seed=i), np.mean),
    "mean, t": (lambda strata, i: t_interval(strata), np.mean),
    "iqm, bootstrap": (lambda strata, i: stratified_interval(strata, iqm, resamples=1000, seed=i), iqm),
}
"""Interval functions of strata, with the statistic that the interval should cover."""


def coverage(
    interval: str, distribution: str, seeds: int, strata: int = 1, repeats: int = 4000, seed: int = 0
) -> Interval:
    """Return the share of simulated comparisons in which a nominal 95 % interval covers the true value.

    Stratum h lies h standard deviations above the first. The true value is that of a million draws of each stratum;
    with fewer than 4 values in all the interquartile mean is the mean, and so is its true value.

    Args:
        interval: of `INTERVALS`.
        distribution: of `DISTRIBUTIONS`.
        seeds: per stratum, at least 2.
        strata: number of strata.
        repeats: simulated comparisons.
        seed: of the simulation.

    Returns:
        The share, with Wilson's interval; 0.95 would be honest.

    Raises:
        InputError: fewer than 2 seeds, which determine no interval.

    Example:
        >>> interval = coverage("mean, t", "normal", seeds=3, repeats=400)
        >>> interval.low < 0.95 < interval.high
        True
    """
    if seeds < 2:
        raise InputError(f"seeds={seeds}: must be at least 2")
    make, statistic = INTERVALS[interval]
    generator = np.random.default_rng(seed)
    many = DISTRIBUTIONS[distribution](generator, 1_000_000)
    spread = many.std()
    everything = np.concatenate([many + h * spread for h in range(strata)])
    truth = float(np.mean(everything) if seeds * strata < 4 else statistic(everything))  # type: ignore[arg-type]
    held = []
    for i in range(repeats):
        estimate = make([list(DISTRIBUTIONS[distribution](generator, seeds) + h * spread) for h in range(strata)], i)
        held.append(estimate.low <= truth <= estimate.high)
    return rate(held)


CHANGES: Mapping[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda generator, shape: generator.normal(0.3, size=shape),
    "log-normal, sigma 1": lambda generator, shape: generator.lognormal(sigma=1.0, size=shape),
    "log-normal, sigma 2": lambda generator, shape: generator.lognormal(sigma=2.0, size=shape),
    "one in 20 gains 10": lambda generator, shape: (
        10.0 * (generator.random(shape) < 0.05) + generator.normal(0, 0.1, shape)
    ),
    "one in 100 gains 100": lambda generator, shape: (
        100.0 * (generator.random(shape) < 0.01) + generator.normal(size=shape)
    ),
}
"""How a problem's mean score may change from one evaluation to the next, where scores have no bounds."""


def change_coverage(change: str, problems: int, repeats: int = 4000, seed: int = 0) -> Interval:
    """Return in what share of simulated evaluations the 95 % interval of the paired difference holds the true mean.

    Args:
        change: of `CHANGES`.
        problems: of an evaluation, at least 2.
        repeats: simulated pairs of evaluations.
        seed: of the simulation.

    Returns:
        The share, with Wilson's interval; 0.95 would be honest.

    Example:
        >>> change_coverage("normal", problems=5).value > 0.93, change_coverage("one in 20 gains 10", 5).value < 0.3
        (True, True)
    """
    generator = np.random.default_rng(seed)
    truth = CHANGES[change](generator, (1, 4_000_000)).mean()
    low, high = difference_interval(CHANGES[change](generator, (repeats, problems)), n_samples=None)
    return rate([bool(held) for held in (low <= truth) & (truth <= high)])
