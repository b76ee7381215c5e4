"""Evaluation on held-out problems: avg@k with an interval, its change since step 0, and unbiased pass@k."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from drpo.errors import InputError
from drpo.rewards import RewardPool
from drpo.rollout import EpisodeDriver
from drpo.train.metrics import part_means
from drpo.train.records import Evaluation
from drpo.train.score import require_scored, score
from drpo.types import Problem, Sampling, ScoredGroup

RIGHT = 1.0
"""A score from here on counts as right in pass@k."""
_FEWEST = 3
"""Fewest problems with a mean above 0, and below 1, whose spread is used."""


def examine(
    driver: EpisodeDriver, problems: Sequence[Problem], sampling: Sampling, pool: RewardPool, *, seed: int
) -> list[ScoredGroup]:
    """Return `score_held_out`, for `summed_up`, where there is something to sum up.

    Args:
        driver, problems, sampling, pool, seed: as there.

    Raises:
        InputError: no problems, or the reward scored no completion.
    """
    if not problems:
        raise InputError("evaluation: no held-out problems; set --eval-problems, or an --eval-task that has some")
    groups = score_held_out(driver, problems, sampling, pool, seed=seed)
    require_scored(groups, pool.config)
    return groups


def score_held_out(
    driver: EpisodeDriver, problems: Sequence[Problem], sampling: Sampling, pool: RewardPool, *, seed: int
) -> list[ScoredGroup]:
    """Return a scored group for every held-out problem.

    The random numbers depend on the seed and the problem alone, so evaluations of one run share them.

    Args:
        driver: its engine holds the weights to evaluate.
        problems: held out; a rank's shard of them, possibly empty.
        sampling: may be greedy or truncated.
        pool: runs the reward.
        seed: of the random numbers.
    """
    plain = replace(sampling, top_logprobs=0)  # which only training reads
    return score(problems, driver.run(problems, plain, ("evaluation", seed)), pool)


def summed_up(
    groups: Sequence[ScoredGroup],
    n_samples: int,
    *,
    step: int,
    before: Mapping[str, float] | None = None,
    n_before: int | None = None,
) -> Evaluation:
    """Return the evaluation that the scored groups of all held-out problems give.

    Args:
        groups: of which at least one has a scored completion.
        n_samples: completions drawn per problem.
        step: for the record.
        before: `problem_means` of the evaluation to compare with, or None.
        n_before: completions that it drew per problem; None for as many.
    """
    fewest = min(n_samples, n_before or n_samples)
    episodes = [e for g in groups for e in g.all_episodes]
    scored = [g for g in groups if len(g.rewards)]
    means = {g.problem.id: float(g.rewards.double().mean()) for g in scored}
    reward_mean = sum(means.values()) / len(means)
    bounded = all(bool(((g.rewards >= 0) & (g.rewards <= 1)).all()) for g in scored)
    most = len(scored) ** 2 / sum(1 / len(g.rewards) for g in scored)
    low, high = mean_interval(np.array(list(means.values())), most) if bounded else (math.nan, math.nan)
    ks = [2**i for i in range(n_samples.bit_length())]
    return Evaluation(
        step=step,
        reward_mean=reward_mean,
        low=float(low),
        high=float(high),
        pass_at={k: _mean_pass_at(scored, k) for k in ks},
        n_problems=len(scored),
        n_samples=n_samples,
        mean_length=sum(e.n_sampled for e in episodes) / len(episodes),
        truncated=sum(e.finish_reason == "length" for e in episodes) / len(episodes),
        failed=sum(len(g.unscored) + len(g.scored_zero) for g in groups),
        reward_parts=part_means(groups),
        problem_means=means,
        **_compared(means, before or {}, fewest if bounded else None),
    )


def before_training(evaluations: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], int | None]:
    """Return `problem_means` and `n_samples` of step 0; empty where records of earlier versions do not have them.

    Args:
        evaluations: records of evaluations.jsonl.
    """
    first = next((e for e in evaluations if e["step"] == 0), {})
    means = first.get("problem_means")
    sound = isinstance(means, Mapping) and all(isinstance(mean, int | float) for mean in means.values())
    return dict(means) if sound and means else {}, first.get("n_samples")


def _compared(now: Mapping[str, float], before: Mapping[str, float], n_samples: int | None) -> dict[str, float]:
    """Return the fields of the difference between two evaluations; empty without a problem in common."""
    differences = np.array([now[name] - before[name] for name in now if name in before])
    if not len(differences):
        return {}
    bounded = n_samples is not None and all(0 <= mean <= 1 for mean in before.values())
    low, high = map(float, difference_interval(differences, n_samples if bounded else None))
    known = {} if math.isnan(low) else {"difference_low": low, "difference_high": high}
    return {"difference": float(differences.mean()), **known}


def mean_interval(means: NDArray[Any], most: float, level: float = 0.95) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the interval for avg@k, from the means of n problems over k samples each; scores lie in [0, 1].

    Wilson's score interval with the problems' effective number, which the spread s of their means gives:

        n_eff = n m (1 - m) / s^2, within [n, n k]
        (m + q^2 / 2 n_eff +- q sqrt(m (1 - m) / n_eff + q^2 / 4 n_eff^2)) / (1 + q^2 / n_eff)

    Between the bounds q is Student's, with degrees of freedom 2 n / (kurtosis - (n - 3) / (n - 1)), at most n - 1; at
    them it is the normal one. With k = 1 that is Wilson's interval, which is also the outer bound, and the answer where
    fewer than 3 problems have a mean above 0, or below 1: the spread of so few says nothing.

    Over 4 distributions of the chance to be right, 30 to 200 problems and k = 4 or 16 it covers 94.5 to 96.5 %
    (docs/statistics.md).

    Args:
        means: [..., n] float64 in [0, 1], n >= 1.
        most: n k; n^2 / sum(1 / k_i) where k differs from problem to problem.
        level: of confidence, in (0, 1).

    Returns:
        Low and high, [...].

    Example:
        >>> low, high = mean_interval(np.array([0.25, 0.5, 0.75, 1.0, 0.5, 0.0]), most=24)
        >>> round(float(low), 3), round(float(high), 3), [round(x, 3) for x in wilson(0.5, 6)]
        (0.202, 0.798, [0.188, 0.812])

    Source: score intervals with an effective sample size: Korn and Graubard, Survey Methodology 24 (1998).
    """
    n = means.shape[-1]
    mean = means.mean(-1)
    few = np.minimum((means > 0).sum(-1), (means < 1).sum(-1)) < _FEWEST
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = ((means - mean[..., None]) ** 2).sum(-1) / max(1, n - 1)
        effective = np.where(few, n, np.clip(n * mean * (1 - mean) / spread, n, most))
    normal = NormalDist().inv_cdf((1 + level) / 2)
    student = stdtrit(_freedom(means), (1 + level) / 2)
    low, high = _score_interval(mean, effective, np.where((n < effective) & (effective < most), student, normal))
    outer_low, outer_high = _score_interval(mean, n, normal)
    return np.maximum(low, outer_low), np.minimum(high, outer_high)


def difference_interval(
    differences: NDArray[Any], n_samples: int | None, level: float = 0.95
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the interval for the mean change of n problems from one evaluation to another.

    Student's, after two made-up problems have been added, one that gained 1 / sqrt(k) and one that lost it, so that a
    few changes, or none, do not seem certain. Degrees of freedom as in `mean_interval`. Over 6 distributions of change,
    30 to 200 problems, k = 1, 4 or 16, with shared random numbers or without, it covers 93 to 100 %.

    Args:
        differences: [..., n] float64, in [-1, 1] where `n_samples` is given.
        n_samples: k of either evaluation, the smaller where they differ; None where scores leave [0, 1]: then nothing
            is added.
        level: of confidence, in (0, 1).

    Returns:
        Low and high, [...]; nan where nothing is added and fewer than 2 values differ.

    Example:
        >>> low, high = difference_interval(np.array([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]), n_samples=1)
        >>> round(float(low), 3), round(float(high), 3)
        (-0.183, 0.783)

    Source: for k = 1, Bonett and Price, J. Educational and Behavioral Statistics 37 (2012).
    """
    if n_samples is not None:
        added = np.full((*differences.shape[:-1], 1), n_samples**-0.5)
        differences = np.concatenate([differences, added, -added], axis=-1)
    n, mean = differences.shape[-1], differences.mean(-1)
    squares = ((differences - mean[..., None]) ** 2).sum(-1)
    known = differences.max(-1) > differences.min(-1)
    half = np.full_like(mean, np.nan)
    np.divide(squares, n * (n - 1), out=half, where=known)
    half = stdtrit(_freedom(differences), (1 + level) / 2) * np.sqrt(half)
    low, high = mean - half, mean + half
    return (low, high) if n_samples is None else (np.maximum(low, -1), np.minimum(high, 1))


def _freedom(values: NDArray[Any]) -> NDArray[Any]:
    """Degrees of freedom of the variance of n values: less than n - 1 where their tails are heavier than the normal's.

    From Var(s^2) / sigma^4 = (kurtosis - (n - 3) / (n - 1)) / n, which is 2 / (n - 1) for normal values.
    """
    n = values.shape[-1]
    squares = (values - values.mean(-1)[..., None]) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        kurtosis = (squares**2).mean(-1) / squares.mean(-1) ** 2
        freedom = 2 * n / (kurtosis - (n - 3) / max(1, n - 1))
    bounded: NDArray[Any] = np.nan_to_num(np.clip(freedom, 1, max(1, n - 1)), nan=1.0)
    return bounded


def wilson(mean: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for the mean of n independent values in [0, 1].

    For values that are not 0 or 1 (partial scores, or means over several samples) it is on the safe side: no variable
    in [0, 1] varies more than mean (1 - mean). A mean outside [0, 1] has no such interval and gives (nan, nan).

    Args:
        mean: of the n values.
        n: number of independent values, >= 1.
        level: of confidence, in (0, 1).

    Example:
        >>> [round(x, 3) for x in wilson(0.5, 100)]
        [0.404, 0.596]

    Source: E. B. Wilson, JASA 22 (1927).
    """
    if not 0 <= mean <= 1:
        return math.nan, math.nan
    low, high = _score_interval(mean, n, NormalDist().inv_cdf((1 + level) / 2))
    return float(low), float(high)


def _score_interval(mean: Any, n: Any, quantile: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    z2 = quantile**2
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return np.maximum(0.0, center - half), np.minimum(1.0, center + half)


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k samples is right, from n >= k samples.

        1 - C(n - n_right, k) / C(n, k)

    Args:
        n: samples drawn.
        n_right: of them, right.
        k: in [1, n].

    Raises:
        InputError: k is not in [1, n].

    Example:
        >>> pass_at_k(4, 1, 4), pass_at_k(4, 1, 1)
        (1.0, 0.25)

    Source: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374, Eq. 1.
    """
    if not 1 <= k <= n:
        raise InputError(f"pass@k: k={k} must be in [1, n={n}]")
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def _mean_pass_at(groups: Sequence[ScoredGroup], k: int) -> float:
    """Return the mean pass@k of the groups with at least k scored completions; nan without any."""
    values = [pass_at_k(len(g.rewards), int((g.rewards >= RIGHT).sum()), k) for g in groups if len(g.rewards) >= k]
    return sum(values) / len(values) if values else math.nan
