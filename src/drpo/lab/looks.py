"""A study with claims named in advance: what it can decide before it runs, and which trials are due at each look."""

from collections.abc import Sequence
from dataclasses import replace

from drpo.errors import InputError, counted
from drpo.lab.claims import COLLAPSE, PLAN, ClaimPlan, Contrast, decide, family
from drpo.lab.multiple import look_levels
from drpo.lab.power import POWER, collapses_told_apart, detectable, equivalence_power
from drpo.lab.trial_result import SERIES, WAITING, Comparison, Trial
from drpo.train.config import Run, flat_json


def planned_comparison(runs: Sequence[Run]) -> Comparison:
    """Return a comparison whose trials have not begun."""
    waiting = [Trial(run.name, flat_json(run), WAITING, None, dict.fromkeys(SERIES, ()), ()) for run in runs]
    return Comparison("planned", tuple(waiting), {})


def joined(planned: Comparison, so_far: Comparison) -> Comparison:
    """Return the planned trials, those that are there as they are, then those that are there besides."""
    there = {trial.name: trial for trial in so_far.trials}
    names = {trial.name for trial in planned.trials}
    first = tuple(there.get(trial.name, trial) for trial in planned.trials)
    return replace(planned, trials=first + tuple(t for t in so_far.trials if t.name not in names))


def require_possible(plan: ClaimPlan, planned: Comparison) -> None:
    """Raise unless the planned trials can decide what a plan names.

    Raises:
        InputError: an objective is missing, learning rates differ, or there are fewer seeds than the last look has.
    """
    family(plan, planned)
    seeds = len({trial.seed for trial in planned.trials})
    if seeds < plan.seeds[-1]:
        raise InputError(f"{PLAN}: its last look has {plan.seeds[-1]} seeds, and --seeds names {seeds}; name more")


def due(plan: ClaimPlan, comparison: Comparison) -> frozenset[str]:
    """Return the names of the trials that the present look has: first seeds of all, then more of what is undecided.

    Args:
        plan: what was named in advance.
        comparison: all planned trials, finished or not (`joined`).
    """
    names = {name for d in decide(plan, comparison) for name in _of(comparison, d.contrast, d.next_seeds or d.seeds)}
    in_plan = {name for pair in plan.pairs for name in pair}
    others = [trial for trial in comparison.trials if trial.objective not in in_plan]
    first = sorted({trial.seed for trial in comparison.trials})[: plan.seeds[0]]
    return frozenset(names | {trial.name for trial in others if trial.seed in first})


def _of(comparison: Comparison, contrast: Contrast, n: int) -> set[str]:
    """Return the names of a contrast's trials of its first n seeds."""
    fields = comparison.regime_fields
    both = [t for t in comparison.trials if t.objective in (contrast.of, contrast.against)]
    strata = contrast.strata
    trials = [t for t in both if any(t.regime(fields) == r and rate in (None, t.learning_rate) for r, rate in strata)]
    first = sorted({trial.seed for trial in trials})[:n]
    return {trial.name for trial in trials if trial.seed in first}


def power_lines(plan: ClaimPlan, planned: Comparison) -> list[str]:
    """Say what the seeds of each look can decide, in the score's unit where the plan names a spread.

    Args:
        plan: what was named in advance.
        planned: its trials.
    """
    n = len(family(plan, planned))
    lines = [f"{counted(n, 'comparison')} named in advance, at {100 * plan.error_rate:g}% together, by {plan.test}"]
    for seeds, level in zip(plan.seeds, look_levels(plan.seeds, plan.error_rate), strict=True):
        lines.append(f"{seeds} seeds decide {_decides(plan, seeds, level / n)}")
    if plan.spread is None and plan.endpoint != COLLAPSE:
        lines.append("a spread in claims.toml, from a pilot's seeds, gives these in the unit of the score")
    return lines


def _decides(plan: ClaimPlan, seeds: int, level: float) -> str:
    if plan.endpoint == COLLAPSE:
        k = collapses_told_apart(seeds, level, plan.test)
        return "no rate of collapse: more seeds are needed" if k is None else f"0 from {k} runs that collapse"
    apart = detectable(seeds, level, plan.test)
    if apart is None:
        return f"nothing: no sign of {seeds} differences is significant at {level:.2g}; more seeds are needed"
    if plan.spread is None:
        return f"differences above {apart:.1f} standard deviations of a seed's difference (power {POWER:.0%})"
    said = f"differences above {apart * plan.spread:.2g} (power {POWER:.0%})"
    if plan.margin is None:
        return said
    chance = equivalence_power(seeds, level, plan.margin / plan.spread, plan.test)
    return f"{said}, and equivalence within {plan.margin:g} with a chance of {chance:.0%} if nothing differs"
