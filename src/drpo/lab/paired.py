"""Tests and intervals of paired differences over seeds: Student's, exact sign flips, and equivalence.

Arrays are [..., R, S]: the difference of two objectives in R regimes with S seeds, nan where there is no pair. A
*block* is a seed: its runs in all regimes share problems, order and random numbers, so their differences are not
independent and change sign together. Different seeds in different regimes are separate blocks. docs/statistics.md says
why, and has the simulated error rates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from drpo.errors import InputError

Array = NDArray[Any]
Alternative = Literal["two-sided", "greater", "less"]

FLIPS = 2**14
"""Sign flips that are enumerated: exact up to 14 seeds. Beyond, that many are drawn, and p counts the observed one."""
_BATCH = 64  # sign flips held in memory at a time
_EQUAL = 1e-12  # a spread below this share of the values is rounding


@dataclass(frozen=True)
class Blocks:
    """A mean of paired differences, split by seed: mean over regimes of the mean over seeds.

    Args:
        sums: [..., S], a seed's part of the mean; 0 without a pair.
        weights: [..., S], a seed's part of the weight; they add up to 1, or to 0 without any pair.
    """

    sums: Array
    weights: Array

    @property
    def n(self) -> Array:
        """The number of seeds with a pair, [...]."""
        return np.asarray((self.weights > 0).sum(-1))

    @property
    def mean(self) -> Array:
        """The mean difference, [...]; 0 without any pair."""
        return np.asarray(self.sums.sum(-1))

    @property
    def standard_error(self) -> Array:
        """The standard error of the mean, [...]; nan with fewer than two seeds.

            root of the sum over s of (sum_s - weight_s mean)^2 / (1 - weight_s)

        With every pair there it is that of the n means of seeds.
        """
        left = self.sums - self.weights * self.mean[..., None]
        error = np.sqrt((left**2 / np.maximum(1 - self.weights, _EQUAL)).sum(-1))
        known = np.where(error <= _EQUAL * np.abs(self.sums).max(-1, initial=0), 0.0, error)
        return np.asarray(np.where(self.n > 1, known, np.nan))

    @property
    def freedom(self) -> Array:
        """Degrees of freedom, [...]: 1 / (sum of squared weights) - 1, which is n - 1 with every pair there."""
        return np.asarray(1 / np.maximum((self.weights**2).sum(-1), _EQUAL) - 1)


def blocks(differences: Array) -> Blocks:
    """Split a mean difference by seed. Every regime weighs the same, and within it every pair.

    Args:
        differences: [..., R, S], nan where there is no pair.

    Example:
        >>> two_regimes = blocks(np.array([[0.1, 0.3], [0.2, np.nan]]))
        >>> float(two_regimes.mean), two_regimes.weights.tolist()
        (0.2, [0.75, 0.25])
    """
    there = ~np.isnan(differences)
    in_regime = there.sum(-1, keepdims=True)
    regimes = (in_regime > 0).sum(-2, keepdims=True)
    weights = there / np.maximum(in_regime, 1) / np.maximum(regimes, 1)
    return Blocks((np.where(there, differences, 0.0) * weights).sum(-2), weights.sum(-2))


def t_interval_of(parts: Blocks, level: float = 0.95) -> tuple[Array, Array]:
    """Return the bounds of Student's interval for the mean difference.

    Args:
        parts: by seed.
        level: of confidence, in (0, 1).

    Returns:
        low, high: [...]; nan with fewer than two seeds.

    Example:
        >>> [round(float(x), 3) for x in t_interval_of(blocks(np.array([[1.0, 2.0, 3.0]])))]
        [-0.484, 4.484]
    """
    half = stats.t.ppf((1 + level) / 2, parts.freedom) * parts.standard_error
    return parts.mean - half, parts.mean + half


def t_test(parts: Blocks, shift: float = 0.0, alternative: Alternative = "two-sided") -> Array:
    """Return the p-values of the paired t-test that the mean difference is `shift`.

    Where all differences are equal, Student's test knows no spread: their p is that of the sign flips.

    Args:
        parts: by seed.
        shift: the mean under the null hypothesis.
        alternative: of the mean to `shift`.

    Returns:
        p: [...]; 1 with fewer than two seeds.

    Example:
        >>> round(float(t_test(blocks(np.array([[0.1, 0.2, 0.3]])))), 3)
        0.074

    Source: Student, Biometrika 6 (1908). With a pair in every regime this is `scipy.stats.ttest_1samp` of the seeds'
    means. Else the variance is corrected for weights: R. M. Bell and D. F. McCaffrey, Survey Methodology 28 (2002).
    """
    apart = parts.mean - shift
    with np.errstate(divide="ignore", invalid="ignore"):
        t, freedom = apart / parts.standard_error, parts.freedom
        tail = {"two-sided": lambda: 2 * stats.t.sf(np.abs(t), freedom), "greater": lambda: stats.t.sf(t, freedom)}
        p = tail.get(alternative, lambda: stats.t.cdf(t, freedom))()
    towards = {"two-sided": np.abs(apart), "greater": apart, "less": -apart}[alternative]
    sides = 2 if alternative == "two-sided" else 1
    without = np.where(towards > _EQUAL, sides / 2.0**parts.n, 1.0)
    return np.asarray(np.where(parts.n < 2, 1.0, np.where(parts.standard_error > 0, p, without)))


def sign_flip_test(parts: Blocks, shift: float = 0.0, alternative: Alternative = "two-sided") -> Array:
    """Return the p-values of the exact sign-flip test: if nothing differs, a seed's differences may change their sign.

        p = share of the 2^n signs for which sum over s of sign_s (sum_s - shift weight_s) is as extreme as observed

    All regimes of a seed change sign together. Exact where differences are symmetric about `shift`, whatever their
    distribution, as they are if two objectives do the same. With n seeds p is at least 2 / 2^n (one-sided 1 / 2^n).

    Args:
        parts: by seed.
        shift: the mean under the null hypothesis.
        alternative: of the mean to `shift`.

    Returns:
        p: [...]; 1 with fewer than two seeds.

    Example:
        >>> float(sign_flip_test(blocks(np.array([[0.1, 0.2, 0.3, 0.1, 0.2, 0.2]]))))
        0.03125

    Source: R. A. Fisher, The Design of Experiments (1935), section 21; `scipy.stats.permutation_test`.
    """
    paired = (parts.weights > 0).reshape(-1, parts.weights.shape[-1]).any(0)
    values = (parts.sums - shift * parts.weights)[..., paired]
    if values.shape[-1] < 2:
        return np.ones(values.shape[:-1])
    return np.asarray(
        stats.permutation_test(
            (values,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=FLIPS,
            batch=_BATCH,
            alternative=alternative,
            axis=-1,
            rng=np.random.default_rng(0),
        ).pvalue
    )


Test = Callable[..., Array]
"""test(parts, shift, alternative): p-values [...]."""
TESTS: dict[str, Test] = {"t": t_test, "sign_flip": sign_flip_test}


def equivalence(parts: Blocks, margin: float, test: Test = t_test) -> Array:
    """Return the p-values of equivalence: two one-sided tests, that the mean is above -margin, and below margin.

        p = max(p of mean > -margin, p of mean < margin)

    Args:
        parts: by seed.
        margin: the largest difference that does not matter, > 0.
        test: of `TESTS`.

    Raises:
        InputError: a margin of 0 or less.

    Example:
        >>> apart = blocks(np.array([[0.01, -0.01, 0.0, 0.02]]))
        >>> bool(equivalence(apart, 0.05) < 0.05), bool(equivalence(apart, 0.01) < 0.05)
        (True, False)

    Source: D. J. Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    if not margin > 0:
        raise InputError(f"margin={margin}: must be above 0, the largest difference that does not matter")
    return np.maximum(test(parts, -margin, "greater"), test(parts, margin, "less"))


@cache
def barnard(collapsed: tuple[int, int], runs: tuple[int, int]) -> float:
    """Return the two-sided p-value of Barnard's exact test that two objectives collapse equally often.

    Args:
        collapsed: runs that collapsed, of each.
        runs: of each, at least one.

    Example:
        >>> round(barnard((0, 5), (5, 5)), 4), barnard((0, 0), (5, 5))
        (0.002, 1.0)

    Source: G. A. Barnard, Biometrika 34 (1947); `scipy.stats.barnard_exact`.
    """
    table = [list(collapsed), [n - k for k, n in zip(collapsed, runs, strict=True)]]
    return float(stats.barnard_exact(table).pvalue)
