"""Accuracy on problems that training never samples: avg@k with an interval, and unbiased pass@k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from drpo.errors import InputError
from drpo.rewards import RewardPool
from drpo.rollout import Engine
from drpo.train.score import require_marked, score
from drpo.types import Group, Problem, Sampling

RIGHT = 1.0
"""A score from here on counts as right in pass@k."""


@dataclass(frozen=True)
class Evaluation:
    """How well the policy does on held-out problems.

    Args:
        step: rollouts trained on before it.
        accuracy: avg@k: the mean over problems of the mean score of k samples, in the reward's units.
        low, high: 95 % Wilson interval of the accuracy, with n = problems; nan where a score leaves [0, 1].
        pass_at: k -> unbiased pass@k for k = 1, 2, 4, ... up to the samples.
        n_problems: problems with at least one marked completion.
        n_samples: completions drawn per problem.
        mean_length: tokens.
        truncated: share of completions cut at max_new_tokens.
        failed: completions whose reward failed or abstained; they count nowhere, or as 0 where `Marking.on_failure` is
            zero and the reward failed.
    """

    step: int
    accuracy: float
    low: float
    high: float
    pass_at: dict[int, float]
    n_problems: int
    n_samples: int
    mean_length: float
    truncated: float
    failed: int


def evaluate(
    engine: Engine, problems: Sequence[Problem], sampling: Sampling, pool: RewardPool, *, seed: int, step: int
) -> Evaluation:
    """Draw `sampling.samples` completions of every problem, mark them, and sum up: `mark_held_out`, then `summed_up`.

    Args:
        engine: holds the weights to evaluate.
        problems: held out, at least one.
        sampling: may be greedy or truncated.
        pool: runs the reward.
        seed: of the random numbers.
        step: for the record.

    Raises:
        InputError: no problems, or the reward marked no completion.
    """
    if not problems:
        raise InputError("evaluation: no held-out problems; set --eval-problems, or an --eval-task that has some")
    groups = mark_held_out(engine, problems, sampling, pool, seed=seed)
    require_marked(groups, pool.marking)
    return summed_up(groups, sampling.samples, step=step)


def mark_held_out(
    engine: Engine, problems: Sequence[Problem], sampling: Sampling, pool: RewardPool, *, seed: int
) -> list[Group]:
    """Return a marked group for every held-out problem.

    The random numbers depend on the seed and the problem alone, so evaluations of one run share them.

    Args:
        engine: holds the weights to evaluate.
        problems: perhaps some of them, or none.
        sampling: may be greedy or truncated.
        pool: runs the reward.
        seed: of the random numbers.
    """
    plain = replace(sampling, top_logprobs=0)  # which only training reads
    return score(problems, engine.generate(problems, plain, seed=("evaluation", seed)) if problems else [], pool)


def summed_up(groups: Sequence[Group], n_samples: int, *, step: int) -> Evaluation:
    """Return what the marked groups of all held-out problems say.

    Args:
        groups: of which at least one has a marked completion.
        n_samples: completions drawn per problem.
        step: for the record.
    """
    completions = [c for g in groups for c in (*g.completions, *(u.completion for u in g.unmarked))]
    marked = [g for g in groups if len(g.rewards)]
    accuracy = sum(float(g.rewards.double().mean()) for g in marked) / len(marked)
    bounded = all(bool(((g.rewards >= 0) & (g.rewards <= 1)).all()) for g in marked)
    low, high = wilson(accuracy, len(marked)) if bounded else (math.nan, math.nan)
    ks = [2**i for i in range(n_samples.bit_length())]
    return Evaluation(
        step=step,
        accuracy=accuracy,
        low=low,
        high=high,
        pass_at={k: _mean_pass_at(marked, k) for k in ks},
        n_problems=len(marked),
        n_samples=n_samples,
        mean_length=sum(len(c.token_ids) for c in completions) / len(completions),
        truncated=sum(c.finish == "length" for c in completions) / len(completions),
        failed=sum(len(g.unmarked) + len(g.zeroed) for g in groups),
    )


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
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


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


def _mean_pass_at(groups: Sequence[Group], k: int) -> float:
    """Over the groups with at least k marked completions; nan where there is none."""
    values = [pass_at_k(len(g.rewards), int((g.rewards >= RIGHT).sum()), k) for g in groups if len(g.rewards) >= k]
    return sum(values) / len(values) if values else math.nan
