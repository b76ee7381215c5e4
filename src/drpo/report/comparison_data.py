"""What the page of a comparison says, as plain data: `lab.analysis` has the figures, this puts them side by side."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from scipy.special import stdtrit

from drpo.errors import InputError
from drpo.lab.analysis import Condition, best, conditions, difference, label
from drpo.lab.grid import differing
from drpo.lab.outcome import DIVERGED, FAILED, FINISHED, Cell, Comparison
from drpo.lab.statistics import Interval
from drpo.objectives import caution, parse
from drpo.report.bands import over_seeds, rounded, shown_steps, spread, student
from drpo.report.comparison_table import claim_lines, collapse, reached
from drpo.report.facts import flat, machine
from drpo.spelling import names_code

THRESHOLD = 0.5
"""Of the training reward, for when it was reached."""
Key = tuple[tuple[Any, ...], str, float]
"""Regime, objective and learning rate: what the cells of a condition share."""


@dataclass(frozen=True)
class Metric:
    """A metric of a step, for those who choose one.

    Args:
        name: as the records have it, one of `outcome.SERIES`.
        title: in the list.
        unit: of the vertical axis.
        caption: how to read it.
        log: whether that axis is logarithmic.
    """

    name: str
    title: str
    unit: str
    caption: str
    log: bool = False


METRICS = (
    Metric("shift_p99", "shift |π-μ|, 99th percentile", "probability", "How far tokens moved from the sampler.", True),
    Metric("outside", "outside the region", "share of tokens", "Beyond the radius, or 0.15 where there is none."),
    Metric("held", "held or pulled back", "share of tokens", "The gradient weight is 0 or less."),
    Metric("ratio_max", "largest ratio", "π/μ", "The most that one token gained.", True),
    Metric("entropy", "entropy", "nats", "Mean over trained tokens; low where there is little left to explore."),
    Metric("k3", "KL(μ || π), k3", "nats", "How far the policy is from the sampler.", True),
    Metric("grad_norm", "gradient norm", "L2 norm", "Before clipping; the largest of the step's updates.", True),
    Metric("truncated", "truncated", "share of completions", "Cut at max_new_tokens."),
)


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """Return what the page of a comparison says, but for links to other pages.

    Args:
        comparison: any; cells without a result appear among the cells alone.
    """
    found = conditions(comparison, THRESHOLD)
    chosen = best(found)
    regimes, fields = [regime for regime, _ in comparison.by_regime()], comparison.regime_fields
    objectives = comparison.objectives
    cells = _results(comparison)
    rewards = [x for of_one in cells.values() for cell in of_one for x in cell.rewards]

    def place(c: Condition) -> dict[str, int]:
        return {"regime": regimes.index(c.regime), "objective": objectives.index(c.objective)}

    return {
        "name": comparison.name,
        "facts": _facts(comparison),
        "counts": _counts(comparison),
        "cautions": _cautions(objectives),
        "objectives": objectives,
        "regimes": [label(regime, fields) for regime in regimes],
        "threshold": THRESHOLD,
        "range": [min([0.0, *rewards]), max([1.0, *rewards])],
        "conditions": [{**place(c), **_condition(c), "best": c in chosen} for c in found],
        "curves": [{**place(c), **_curves(cells[c.regime, c.objective, c.learning_rate])} for c in chosen],
        "metrics": [vars(metric) for metric in METRICS],
        "differences": [
            {**place(c), "reference": objectives.index(reference.objective), **_difference(c, reference)}
            for c, reference in permutations(chosen, 2)
            if c.regime == reference.regime
        ],
        "claims": list(claim_lines(found, fields)),
        "seeds": seeds_sentence(min((c.mean.n for c in chosen), default=0)),
        "maps": _maps(found, comparison),
        **_cells(comparison),
    }


def seeds_sentence(n: int) -> str:
    """Say what so few seeds can show.

    Example:
        >>> seeds_sentence(3)[:101]
        "With 3 seeds Student's interval reaches 2.5 standard deviations of the seeds to each side of a mean, "
    """
    if n < 2:
        return "One seed does not say how much seeds vary: there is no interval, and nothing may be claimed."
    reach = float(stdtrit(n - 1, 0.975)) / math.sqrt(n)
    return (
        f"With {n} seeds Student's interval reaches {reach:.1f} standard deviations of the seeds to each side of a "
        f"mean, so two objectives whose seeds vary alike must end about {2 * reach:.1f} of them apart before anything "
        "is claimed. No claim does not mean no difference. Where one seed in ten collapses, even this interval holds "
        "less often than it says: look at the seeds themselves."
    )


def _results(comparison: Comparison) -> Mapping[Key, list[Cell]]:
    grouped: defaultdict[Key, list[Cell]] = defaultdict(list)
    for regime, cells in comparison.by_regime():
        for cell in cells:
            if cell.over:
                grouped[regime, cell.objective, cell.learning_rate].append(cell)
    return grouped


def _interval(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _condition(c: Condition) -> dict[str, Any]:
    return {
        "rate": c.learning_rate,
        "n": c.mean.n,
        "final": sorted(c.final.items()),
        "mean": _interval(c.mean),
        "iqm": _interval(c.iqm),
        "area": _interval(c.area),
        "reached": {"n": sum(step is not None for step in c.reached.values()), "text": reached(c)},
        "collapse": {"share": c.collapse.value, "text": collapse(c)},
    }


def _difference(c: Condition, reference: Condition) -> dict[str, Any]:
    interval = difference(c, reference)
    return {"n": interval.n, "difference": _interval(interval)}


def _curves(cells: Sequence[Cell]) -> dict[str, Any]:
    """Of a condition's cells: Student's interval of the reward, and of the metrics the range of the seeds."""
    n_steps = max(len(cell.rewards) for cell in cells)
    kept = shown_steps(n_steps)
    rewards = over_seeds([cell.rewards for cell in cells], n_steps)
    metrics = {m.name: over_seeds([cell.series.get(m.name, ()) for cell in cells], n_steps) for m in METRICS}
    return {
        "step": [i + 1 for i in kept],
        "of": n_steps,
        "reward": {**student(rewards).at(kept), "seeds": [rounded(row[kept]) for row in rewards]},
        **{name: spread(values).at(kept) for name, values in metrics.items()},
    }


def _maps(found: Sequence[Condition], comparison: Comparison) -> list[dict[str, Any]]:
    """Where both vary, the ends over updates and learning rate: for each objective in each rest of the regime."""
    rates, fields = sorted({c.learning_rate for c in found}), comparison.regime_fields
    if len(rates) < 2 or "updates" not in fields:
        return []
    at = fields.index("updates")
    updates, others = sorted({c.regime[at] for c in found}), [name for name in fields if name != "updates"]
    objectives = comparison.objectives
    maps: dict[tuple[str, str], dict[str, Any]] = {}
    for c in found:
        rest = label([value for i, value in enumerate(c.regime) if i != at], others)
        named = {"objective": objectives.index(c.objective), "where": rest, "rates": rates, "updates": updates}
        empty = {name: [[nothing] * len(rates) for _ in updates] for name, nothing in (("end", None), ("text", ""))}
        one = maps.setdefault((c.objective, rest), {**named, **empty})
        fallen = round(c.collapse.value * c.collapse.n)
        y, x = updates.index(c.regime[at]), rates.index(c.learning_rate)
        one["end"][y][x] = c.mean.value
        one["text"][y][x] = f"{c.mean.value:.2f}" + (f", {fallen}/{c.collapse.n} fell" if fallen else "")
    return list(maps.values())


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    configs = [flat(cell.config) for cell in comparison.cells]

    def values(name: str) -> list[str]:
        return list(dict.fromkeys(config.get(name, "-") for config in configs))

    steps, prompts, samples = (_all(values(name)) for name in ("steps", "prompts", "sampling.samples"))
    facts = [
        ("model", _all(values("model"))),
        ("task", _all(values("task"))),
        ("objectives", _all(comparison.objectives)),
        ("seeds", _all(values("seed"))),
        ("learning rate", _all(list(dict.fromkeys(f"{c.learning_rate:g}" for c in comparison.cells)))),
        *((name.replace("_", " "), _all(values(name))) for name in comparison.regime_fields if name != "task"),
        ("each run", f"{steps} steps of {prompts} prompts, {samples} samples each"),
    ]
    return facts + ([("machine", machine(comparison.hardware))] if comparison.hardware else [])


def _all(texts: Sequence[str]) -> str:
    return " · ".join(texts)


def _counts(comparison: Comparison) -> dict[str, int]:
    """How many cells came to what; one that some condition has no seed for is missing."""
    statuses = Counter(cell.status for cell in comparison.cells)
    fields = comparison.regime_fields
    kinds = {(c.regime(fields), c.objective, c.learning_rate) for c in comparison.cells}
    seeds = {c.seed for c in comparison.cells}
    over = {name: statuses.pop(name, 0) for name in (FINISHED, DIVERGED, FAILED)}
    return {**over, **statuses, "missing": max(0, len(kinds) * len(seeds) - len(comparison.cells))}


def _cautions(objectives: Sequence[str]) -> list[str]:
    """What is to be minded, with the objectives that it is true of."""
    said: defaultdict[str, list[str]] = defaultdict(list)
    for name in objectives:
        if names_code(name):  # a page is made without running what its folder names
            continue
        try:
            text = caution(parse(name))
        except InputError:  # nothing that can be built; the page shows it as it is written
            continue
        if text is not None:
            said[text].append(name)
    return [f"{', '.join(names)}: {text}." for text, names in said.items()]


def _cells(comparison: Comparison) -> dict[str, Any]:
    """The cells, with the fields that they differ by; and what all share."""
    configs = [{k: v for k, v in flat(cell.config).items() if k != "name"} for cell in comparison.cells]
    own = differing(configs)
    rows = [
        {"name": c.name, "status": c.status, "reason": c.reason, "steps": len(c.series["reward_mean"])}
        | {"values": [config.get(name, "-") for name in own]}
        for c, config in zip(comparison.cells, configs, strict=True)
    ]
    return {"fields": own, "cells": rows, "shared": [pair for pair in configs[0].items() if pair[0] not in own]}
