"""Several comparisons at one error rate: Holm, Benjamini-Hochberg, difference beside equivalence, and several looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from drpo.errors import InputError
from drpo.lab.paired import Array


def holm(p: Array) -> Array:
    """Return Holm's adjusted p-values; those up to a have at most a chance of a to hold any false rejection.

        adjusted of the i-th smallest = max over j <= i of (m - j + 1) p_(j), at most 1

    Args:
        p: [..., m], valid p-values, dependent or not.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
        [0.03, 0.06, 0.06]

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p, axis=-1, kind="stable")
    steps = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, axis=-1), 1.0)
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), -1)


def benjamini_hochberg(p: Array) -> Array:
    """Return Benjamini and Hochberg's adjusted p-values; of those up to a, an expected share of at most a is false.

    This is the false discovery rate, a weaker promise than Holm's: with ten rejections at 0.1, one may be false.

    Args:
        p: [..., m], of tests that are independent or positively dependent.

    Example:
        >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03])).tolist()
        [0.03, 0.04, 0.04]

    Source: Y. Benjamini and Y. Hochberg, JRSS B 57 (1995); `scipy.stats.false_discovery_control`.
    """
    return np.asarray(stats.false_discovery_control(p, axis=-1))


CORRECTIONS = {"holm": holm, "benjamini_hochberg": benjamini_hochberg}


def holm_with_equivalence(differ: Array, equivalent: Array) -> tuple[Array, Array]:
    """Return adjusted p-values of "differs" and of "is equivalent" for every comparison, at one error rate for all.

    No difference is 0 and beyond the margin at once, so of a comparison's two null hypotheses at most one is true:
    there are at most m true ones, not 2 m. Closed testing with Bonferroni over these sets is Holm's step in which each
    other comparison counts with the larger of its two p-values.

    Args:
        differ: [..., m], p-values of no difference.
        equivalent: [..., m], p-values of a difference beyond the margin.

    Example:
        >>> [a.round(3).tolist() for a in holm_with_equivalence(np.array([0.001, 0.9]), np.array([1.0, 0.02]))]
        [[0.002, 1.0], [1.0, 0.04]]

    Source: J. P. Shaffer, JASA 81 (1986); R. Marcus, E. Peritz and K. R. Gabriel, Biometrika 63 (1976).
    """
    larger = np.maximum(differ, equivalent)

    def adjusted(p: Array) -> Array:
        columns = []
        for i in range(p.shape[-1]):
            among = larger.copy()
            among[..., i] = p[..., i]
            columns.append(holm(among)[..., i])
        return np.stack(columns, axis=-1)

    return adjusted(differ), adjusted(equivalent)


def look_levels(seeds: Sequence[int], error_rate: float) -> tuple[float, ...]:
    """Return what of the error rate each look spends; the levels add up to it.

        spent up to look k = error_rate ln(1 + (e - 1) n_k / n_K),    level of look k = what it adds

    Each look is a test of its own at its level, so the chance of a false claim at any look is at most the sum,
    whatever the test, the dependence of the looks, and the reason to go on.

    Args:
        seeds: at each look, increasing.
        error_rate: of all looks together.

    Example:
        >>> [round(level, 4) for level in look_levels((5, 10), 0.05)]
        [0.031, 0.019]

    Source: K. K. G. Lan and D. L. DeMets, Biometrika 70 (1983), their spending function of Pocock's kind; the levels
    are Bonferroni's, on the safe side of the joint law of the looks.
    """
    if not seeds or seeds[0] < 2 or any(a >= b for a, b in pairwise(seeds)):
        raise InputError(f"seeds={list(seeds)}: must be numbers at each look, increasing from 2, such as [5, 10]")
    spent = [error_rate * math.log(1 + (math.e - 1) * n / seeds[-1]) for n in seeds]
    return tuple(b - a for a, b in pairwise([0.0, *spent]))


@dataclass(frozen=True)
class Verdicts:
    """What several comparisons came to.

    Args:
        look: [..., m], at which one was decided, from 0; -1 if it is undecided.
        differs: [..., m], whether there is a difference.
        equivalent: [..., m], whether the difference is within the margin.
        adjusted: [..., m], the adjusted p-value of the decision; if undecided, of a difference at the last look.
    """

    look: Array
    differs: Array
    equivalent: Array
    adjusted: Array


def decided(differ: Array, equivalent: Array | None, levels: Sequence[float], correction: str = "holm") -> Verdicts:
    """Decide comparisons look by look: at each, those that are undecided are tested at that look's level.

    A comparison that is decided leaves: its p-values of later looks are not read, and Holm's next step is easier for
    the others. The chance of any false decision is at most the sum of the levels.

    Args:
        differ: [K, ..., m], p-values of no difference at each look; nan where it was not looked.
        equivalent: the same, of a difference beyond the margin; None without a margin.
        levels: K of them (`look_levels`).
        correction: of `CORRECTIONS`; without a margin and with one look, if it is not "holm".

    Example:
        >>> looks = np.array([[0.001, 0.04, 0.5], [np.nan, 0.009, 0.5]])
        >>> decided(looks, None, (0.031, 0.019)).look.tolist()
        [0, 1, -1]
    """
    shape = differ.shape[1:]
    look, adjusted = np.full(shape, -1), np.ones(shape)
    differs, same = np.zeros(shape, bool), np.zeros(shape, bool)
    for k, level in enumerate(levels):
        done = look >= 0
        there = ~np.isnan(differ[k])
        p = np.where(done, np.where(differs, 0.0, 1.0), np.where(there, differ[k], 1.0))
        if equivalent is None:
            of_difference, of_equivalence = CORRECTIONS[correction](p), np.ones(shape)
        else:
            within = np.where(done, np.where(same, 0.0, 1.0), np.where(there, equivalent[k], 1.0))
            of_difference, of_equivalence = holm_with_equivalence(p, within)
        apart, close = ~done & (of_difference <= level), ~done & (of_equivalence <= level)
        differs, same = differs | apart, same | close
        adjusted = np.where(done | ~there, adjusted, np.where(close & ~apart, of_equivalence, of_difference))
        look = np.where(apart | close, k, look)
    return Verdicts(look, differs, same, adjusted)
