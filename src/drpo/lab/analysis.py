"""Results of a comparison per regime, objective and learning rate; `lab.claims` says what they support."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from drpo.lab.curves import area_under_curve, smoothed, steps_to
from drpo.lab.statistics import Interval, rate, stratified_interval, t_interval
from drpo.lab.trial_result import DIVERGED, Comparison, Trial

WIDTH = 3
"""Steps over which a training curve is smoothed before `Condition.reached` is computed."""


@dataclass(frozen=True)
class Condition:
    """An objective at a learning rate in a regime, with its seeds.

    Args:
        regime: values of the comparison's regime fields.
        objective: the objective's spec.
        learning_rate: of all its trials.
        final: seed -> `final` of its trial.
        iqm: interquartile mean of `final`, with a bootstrap interval.
        mean: mean of `final`, with Student's interval.
        area: mean training reward over all steps, averaged over seeds, with Student's interval.
        reached: seed -> step at which the smoothed training reward reached the threshold; None if it never did.
        collapse: share of trials that collapsed (`has_collapsed`), with Clopper and Pearson's interval.
        n_diverged: number of trials that diverged.
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


def final(trial: Trial) -> float:
    """Return a trial's final score: the held-out mean, else the mean training reward of the last quarter.

    A diverged run has no policy and scores 0.
    """
    if trial.held_out:
        return trial.held_out[-1][1]
    rewards = trial.rewards
    return fmean(rewards[-max(1, len(rewards) // 4) :])


def start(trial: Trial) -> float | None:
    """Return a trial's score before training: held out, else the training reward of step 1; None if there is neither.

    All objectives of a seed begin with the same policy, so it does not depend on the objective.
    """
    if trial.evaluations and trial.evaluations[0][0] == 0:
        return trial.evaluations[0][1]
    return trial.series["reward_mean"][0] if trial.series["reward_mean"] else None


def area(trial: Trial) -> float:
    """Return the mean training reward over all steps."""
    return area_under_curve(range(1, len(trial.rewards) + 1), trial.rewards)


def has_collapsed(trial: Trial, below: float | None = None) -> bool:
    """Return whether a trial diverged, or ended no higher than it began.

    Args:
        trial: with a result.
        below: the highest final score of a run that collapsed; None for the trial's own score before training.
    """
    bound = start(trial) if below is None else below
    return trial.status == DIVERGED or (bound is not None and final(trial) <= bound)


def conditions(comparison: Comparison, threshold: float = 0.5) -> list[Condition]:
    """Return every condition with a result, by regime, in the order of the trials.

    Args:
        comparison: trials without a result are ignored.
        threshold: of the training reward, for `Condition.reached`.
    """
    result = []
    for regime, trials in comparison.by_regime():
        keys = dict.fromkeys((c.objective, c.learning_rate) for c in trials)
        for objective, learning_rate in keys:
            of_one = [c for c in trials if (c.objective, c.learning_rate) == (objective, learning_rate) and c.over]
            if of_one:
                result.append(_condition(regime, of_one, threshold))
    return result


def _condition(regime: tuple[Any, ...], trials: Sequence[Trial], threshold: float) -> Condition:
    finals = {c.seed: final(c) for c in trials}
    return Condition(
        regime=regime,
        objective=trials[0].objective,
        learning_rate=trials[0].learning_rate,
        final=finals,
        iqm=stratified_interval([list(finals.values())]),
        mean=t_interval([list(finals.values())]),
        area=t_interval([list(map(area, trials))]),
        reached={c.seed: _reached(c.rewards, threshold) for c in trials},
        collapse=rate(list(map(has_collapsed, trials))),
        n_diverged=sum(c.status == DIVERGED for c in trials),
    )


def _reached(rewards: Sequence[float], threshold: float) -> float | None:
    curve = smoothed(rewards, min(WIDTH, len(rewards)))
    return steps_to(range(len(rewards) - len(curve) + 1, len(rewards) + 1), curve, threshold)


def best(candidates: Sequence[Condition]) -> list[Condition]:
    """Return, for each regime and objective, the condition at its best learning rate: the highest mean final score.

    Selection and report use the same seeds. This biases the result of an objective with several learning rates upwards.
    """
    chosen: dict[tuple[Any, str], Condition] = {}
    for c in candidates:
        key = (c.regime, c.objective)
        if key not in chosen or c.mean.value > chosen[key].mean.value:
            chosen[key] = c
    return list(chosen.values())


def difference(a: Condition, b: Condition) -> Interval:
    """Return the mean of a - b over the seeds that both have, with Student's interval."""
    return t_interval([[a.final[seed] - b.final[seed] for seed in sorted(a.final.keys() & b.final.keys())]])


def label(regime: Sequence[Any], fields: Sequence[str]) -> str:
    """Format a regime.

    Example:
        >>> label((8, "int8"), ("updates", "rollout_precision"))
        'updates 8, rollout precision int8'
    """
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(fields, regime, strict=True))
