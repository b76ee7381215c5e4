"""What a comparison says: per regime, objective and learning rate, with intervals; and what may be claimed of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from drpo.lab.curves import area_under_curve, collapsed, smoothed, steps_to
from drpo.lab.statistics import Interval, disjoint, rate, stratified_interval, t_interval
from drpo.lab.trial_result import Comparison, Trial

WIDTH = 3
"""Steps over which a training curve is smoothed before it is asked when it reached something."""


@dataclass(frozen=True)
class Condition:
    """An objective at a learning rate, in a regime, over its seeds.

    Args:
        regime: values of the comparison's regime fields.
            objective: its spec.
        learning_rate: of all its trials.
        final: seed -> `final` of its trial.
            iqm: interquartile mean of them, with a bootstrap interval.
        mean: of them, with Student's interval; what claims are made from.
        area: mean, with Student's interval, of the mean training reward over all steps.
        reached: seed -> step at which the smoothed training reward reached the threshold, None where it never did.
        collapse: share of trials that collapsed or diverged, with Wilson's interval.
        n_diverged: of them, how many had numbers that broke.
    """

    regime: tuple[Any, ...]
    objective: str
    learning_rate: float
    final: Mapping[int, float]
    iqm: Interval
    mean: Interval
    area: Interval
    reached: Mapping[int, float | None]
    collapse: Interval
    n_diverged: int


@dataclass(frozen=True)
class Claim:
    """One objective ended higher than another in a regime: Student's intervals of their means have no point in common.

    Args:
        regime: values of the comparison's regime fields.
        better, worse: objectives, each at its best learning rate.
        difference: mean of the differences seed by seed, with Student's interval.
    """

    regime: tuple[Any, ...]
    better: str
    worse: str
    difference: Interval


def final(trial: Trial) -> float:
    """Return how good a trial is at its end: its held-out mean, else its mean training reward of the last quarter.

    A run that diverged leaves no policy, and counts 0.
    """
    if trial.held_out:
        return trial.held_out[-1][1]
    rewards = trial.rewards
    return fmean(rewards[-max(1, len(rewards) // 4) :])


def has_collapsed(trial: Trial) -> bool:
    """Return whether a trial's numbers broke, or its training reward ended far below its own best."""
    return trial.status == "diverged" or collapsed(trial.rewards)


def conditions(comparison: Comparison, threshold: float = 0.5) -> list[Condition]:
    """Return every condition of a comparison that has a result, regime by regime, in the order of its trials.

    Args:
        comparison: any; trials without a result are left out.
        threshold: of the training reward, for `Condition.reached`.
    """
    found = []
    for regime, trials in comparison.by_regime():
        keys = dict.fromkeys((c.objective, c.learning_rate) for c in trials)
        for objective, learning_rate in keys:
            of_one = [c for c in trials if (c.objective, c.learning_rate) == (objective, learning_rate) and c.over]
            if of_one:
                found.append(_condition(regime, of_one, threshold))
    return found


def _condition(regime: tuple[Any, ...], trials: Sequence[Trial], threshold: float) -> Condition:
    finals = {c.seed: final(c) for c in trials}
    areas = [area_under_curve(range(1, len(c.rewards) + 1), c.rewards) for c in trials]
    return Condition(
        regime=regime,
        objective=trials[0].objective,
        learning_rate=trials[0].learning_rate,
        final=finals,
        iqm=stratified_interval([list(finals.values())]),
        mean=t_interval([list(finals.values())]),
        area=t_interval([areas]),
        reached={c.seed: _reached(c.rewards, threshold) for c in trials},
        collapse=rate([has_collapsed(c) for c in trials]),
        n_diverged=sum(c.status == "diverged" for c in trials),
    )


def _reached(rewards: Sequence[float], threshold: float) -> float | None:
    curve = smoothed(rewards, min(WIDTH, len(rewards)))
    return steps_to(range(len(rewards) - len(curve) + 1, len(rewards) + 1), curve, threshold)


def best(found: Sequence[Condition]) -> list[Condition]:
    """Return, for each regime and objective, the condition with the highest mean end: each at its own learning rate.

    The choice is made on the seeds that are then reported, so every objective with several learning rates looks
    somewhat better than it is, one with one learning rate does not.
    """
    chosen: dict[tuple[Any, str], Condition] = {}
    for c in found:
        key = (c.regime, c.objective)
        if key not in chosen or c.mean.value > chosen[key].mean.value:
            chosen[key] = c
    return list(chosen.values())


def claims(found: Sequence[Condition]) -> Iterator[Claim]:
    """Yield what may be claimed: only where the intervals of two means are disjoint.

    Args:
        found: at most one condition per regime and objective.
    """
    for a, b in combinations(found, 2):
        if a.regime == b.regime and disjoint(a.mean, b.mean):
            better, worse = (a, b) if a.mean.value > b.mean.value else (b, a)
            yield Claim(a.regime, better.objective, worse.objective, difference(better, worse))


def difference(a: Condition, b: Condition) -> Interval:
    """Return by how much a ends above b, seed by seed: mean with Student's interval, over the seeds that both have."""
    return t_interval([[a.final[seed] - b.final[seed] for seed in sorted(a.final.keys() & b.final.keys())]])


def label(regime: Sequence[Any], fields: Sequence[str]) -> str:
    """Write a regime as text.

    Example:
        >>> label((8, "int8"), ("updates", "rollout_precision"))
        'updates 8, rollout precision int8'
    """
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(fields, regime, strict=True))
