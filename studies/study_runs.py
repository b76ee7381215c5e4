"""Studies in which each finished run is a line of a JSON file: runs, registered claims, and what they came to."""

import json
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from drpo.errors import InputError
from drpo.lab.claims import COLLAPSE, ClaimPlan, Decision, plan_from
from drpo.lab.trial_result import FINISHED, WAITING, Comparison, Trial
from drpo.objectives import REGISTRY, Objective
from drpo.spec import format_spec, parse_spec


@lru_cache
def objective_of(text: str) -> Objective:
    """Return the objective of a spec."""
    return parse_spec(text, REGISTRY)


def spec_of(text: str) -> str:
    """Return a spec as records and claims write it."""
    return text if ":" in text else format_spec(objective_of(text), REGISTRY)


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Args:
        regime: its name.
        objective: its spec.
        rate: learning rate.
        seed: of problems and random numbers.
    """

    regime: str
    objective: str
    rate: float
    seed: int


Record = dict[str, Any]
Records = dict[StudyRun, Record]


def read(path: Path) -> Records:
    """Return the finished runs of a file.

    Raises:
        InputError: a line is cut, as a power failure may leave the last one, or is no record.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records: Records = {}
    for number, line in enumerate(lines, 1):
        try:
            r = json.loads(line)
            records[StudyRun(r["regime"], r["objective"], r["rate"], r["seed"])] = r
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} line {number}: no finished run can be read there; remove the line") from None
        if not line.endswith("\n"):
            raise InputError(f"{path} line {number}: has no line break, and the next run would be glued to it; add one")
    return records


def comparison(
    name: str, steps: Callable[[str], int], records: Records, planned: Iterable[StudyRun] = ()
) -> Comparison:
    """Return finished runs, and planned ones that wait, as a comparison whose tasks are the regimes.

    Args:
        name: of the comparison.
        steps: of a run of a regime.
        records: with `start` and `end`, the scores before and after, and `reward`, those of training.
        planned: runs, finished or not.
    """
    cells = dict.fromkeys([*planned, *records])
    return Comparison(name, tuple(_trial(cell, steps(cell.regime), records.get(cell)) for cell in cells), {})


def _trial(cell: StudyRun, steps: int, record: Record | None) -> Trial:
    config = {
        "objective": cell.objective,
        "optimizer": f"adamw({cell.rate!r})",
        "seed": cell.seed,
        "steps": steps,
        "task": cell.regime,
    }
    if record is None:
        return Trial(trial_name(cell), config, WAITING, None, {"reward_mean": ()}, ())
    scores = ((0, record["start"]), (steps, record["end"]))
    return Trial(trial_name(cell), config, FINISHED, None, {"reward_mean": tuple(record["reward"])}, scores)


def trial_name(cell: StudyRun) -> str:
    """Return the name of a run as a trial of the comparison."""
    return f"{cell.regime}/{cell.objective}/{cell.rate}/{cell.seed}"


def plans(claims: Path) -> dict[str, ClaimPlan]:
    """Return the registered families of claims of a file by name."""
    tables = tomllib.loads(claims.read_text(encoding="utf-8"))
    return {name: plan_from(table, f"{claims.name} [{name}]") for name, table in tables.items()}


def verdict(d: Decision) -> str:
    """Return a decision in a word."""
    if d.equivalent:
        return "equivalent"
    return ("above" if d.difference.value > 0 else "below") if d.differs else "undecided"


def line_of(name: str, plan: ClaimPlan, d: Decision) -> str:
    """Return a decision in a line."""
    where = d.contrast.strata[0][0][0] if plan.regimes == "each" else "all regimes"
    size = d.difference
    if not d.seeds:
        shown = f"waits for {plan.seeds[0]} seeds of both"
    elif plan.endpoint == COLLAPSE:
        shown = f"{d.collapse[0].value:.0%} and {d.collapse[1].value:.0%}, {d.seeds} seeds"
    else:
        shown = f"{100 * size.value:+.1f} points ({100 * size.low:+.1f} to {100 * size.high:+.1f}), {d.seeds} seeds"
    return f"{name} | {where} | {d.contrast.of} | {d.contrast.against} | {shown} | {verdict(d)}"
