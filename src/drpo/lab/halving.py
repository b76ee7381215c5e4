"""Learning rates chosen by successive halving, on seeds that are not reported."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from drpo.errors import InputError
from drpo.lab.analysis import final
from drpo.lab.grid import Grid, Variant
from drpo.lab.trial_result import Comparison
from drpo.objectives import REGISTRY
from drpo.spec import format_spec

TUNING = "tuning"
"""Folder, in a comparison's, of the trials that chose its learning rates: a comparison of its own."""


def seeds_per_round(n_rates: int, n_seeds: int) -> tuple[int, ...]:
    """Return how many seeds each round trains: twice as many in each, and all in the last.

    Args:
        n_rates: the most that an objective has; each round keeps half of them, until one is left.
        n_seeds: tuning seeds.

    Example:
        >>> seeds_per_round(n_rates=8, n_seeds=4), seeds_per_round(3, 3), seeds_per_round(1, 4)
        ((1, 2, 4), (1, 3), ())
    """
    rounds = math.ceil(math.log2(n_rates)) if n_rates > 1 else 0
    return tuple(max(1, n_seeds >> (rounds - 1 - i)) for i in range(rounds))


def better_half(scores: Mapping[float, Sequence[float]]) -> tuple[float, ...]:
    """Return the better half of some learning rates, rounded up, by mean score; of equal ones the lower rate.

    Args:
        scores: learning rate -> final scores of its runs. A run that diverged scores 0.

    Example:
        >>> better_half({1e-5: [0.2, 0.3], 2e-5: [0.6, 0.5], 4e-5: [0.0, 0.4]})
        (1e-05, 2e-05)

    Source: Z. Karnin, T. Koren and O. Somekh, Almost Optimal Exploration in Multi-Armed Bandits, ICML 2013; K. Jamieson
    and A. Talwalkar, arXiv 1502.07943.
    """
    ranked = sorted(scores, key=lambda rate: (-fmean(scores[rate]), rate))
    return tuple(sorted(ranked[: math.ceil(len(ranked) / 2)]))


def rates_of(grid: Grid) -> list[Variant]:
    """Return a grid's variants, each with its own learning rates or the grid's."""
    return [replace(v, learning_rates=v.learning_rates or grid.learning_rates) for v in grid.variants]


def require_tunable(grid: Grid, tuning_seeds: Sequence[int]) -> None:
    """Raise unless some objective has several learning rates, and the tuning seeds are others than the grid's.

    Raises:
        InputError: as above.
    """
    both = sorted(set(tuning_seeds) & set(grid.seeds))
    if both:
        raise InputError(f"--tuning-seeds {both[0]}: is one of --seeds too; a rate is chosen on seeds not reported")
    if max(len(v.learning_rates) for v in rates_of(grid)) < 2:
        raise InputError("--tuning-seeds: no objective has several learning rates; name them with --learning-rate")


def round_grid(grid: Grid, variants: Sequence[Variant], seeds: Sequence[int]) -> Grid:
    """Return the grid of a round: the variants that have several rates left, with the round's seeds."""
    return replace(grid, variants=tuple(v for v in variants if len(v.learning_rates) > 1), seeds=tuple(seeds))


def halved(variants: Sequence[Variant], comparison: Comparison, seeds: Sequence[int]) -> list[Variant]:
    """Return the variants with the better half of their rates, by mean final score over all regimes and the seeds.

    Args:
        variants: with their rates so far.
        comparison: the tuning trials, those of this round finished.
        seeds: of this round.

    Raises:
        InputError: a rate has fewer results than another of the same objective.
    """
    kept = []
    for variant in variants:
        name = format_spec(variant.objective, REGISTRY)
        here = [t for t in comparison.trials if t.objective == name and t.seed in seeds and t.over]
        scores = {r: [final(t) for t in here if t.learning_rate == r] for r in variant.learning_rates}
        several = len(variant.learning_rates) > 1
        if several and (not all(scores.values()) or len(set(map(len, scores.values()))) > 1):
            found = ", ".join(f"{rate:g}: {len(of)}" for rate, of in scores.items())
            raise InputError(f"--tuning-seeds: {name} has not one result of each rate for each seed ({found})")
        kept.append(replace(variant, learning_rates=better_half(scores)) if several else variant)
    return kept
