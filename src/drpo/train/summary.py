"""A run's summary: the content of summary.json."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from drpo.objectives import REGISTRY
from drpo.spec import format_spec
from drpo.train import warmed
from drpo.train.config import Run
from drpo.train.log import peak_memory
from drpo.train.metric_tables import ENDPOINT_METRICS
from drpo.train.no_gradient import counted
from drpo.train.records import EVALUATIONS, METRICS, TIMING, read_records
from drpo.train.warned import raised
from drpo.types import FailureKind

PHASES = ("sync", "rollout", "reward", "update")
"""The phases of a step."""


def summarise(
    folder: Path, run: Run, stopped_by: int | None = None, done: int = 0, reason: str | None = None
) -> dict[str, Any]:
    """Return a run's summary: held-out evaluations before and after, work, failures, seconds, memory.

    Args:
        folder: the run's folder.
        run: its configuration.
        stopped_by: number of the signal that ended it early, or None.
        done: steps of its last checkpoint; records may have fewer after `--accept-records`.
        reason: why it ended early, or None.
    """
    evaluations = read_records(folder / EVALUATIONS)
    metrics = read_records(folder / METRICS)
    timing = read_records(folder / TIMING)
    steps = max(done, metrics[-1]["step"] if metrics else 0)
    return {
        "name": run.name,
        "model": run.model.name,
        "objective": format_spec(run.objective.loss, REGISTRY),
        "seed": run.seed,
        "finished": steps >= run.trainer.steps and reason is None,
        "stopped_by_signal": stopped_by,
        "reason": reason,
        "evaluation_before": _evaluation([e for e in evaluations if e["step"] == 0]),
        "evaluation_after": _evaluation([e for e in evaluations if e["step"] == steps > 0]),
        "evaluation_best": _evaluation(sorted(evaluations, key=lambda e: (e["reward_mean"], -e["step"]))),
        "evaluation_difference": _difference([e for e in evaluations if e["step"] == steps > 0]),
        "steps": steps,
        "updates": n_updates(metrics),
        **counted(metrics),
        "warnings": raised(metrics, evaluations),
        "sampled_tokens": sum(m["sampled_tokens"] for m in metrics),
        "trained_tokens": sum(m.get("trained_tokens", 0) for m in metrics),
        "reward_failed": sum(m["reward_failed"] for m in metrics),
        "reward_failures": {k: sum(m.get(f"reward_{k}", 0) for m in metrics) for k in get_args(FailureKind)},
        **_endpoints([*metrics, *evaluations]),
        "seconds": _seconds(timing),
        "training_seconds": sum(v for k, v in _seconds(timing).items() if k in PHASES),
        "peak_memory_bytes": peak_memory(),
        **_curriculum(metrics),
        **_warm_up(folder),
    }


def _warm_up(folder: Path) -> dict[str, Any]:
    """Return what came of a run's warm-up; nothing without one."""
    if (warm_up := warmed.summed_up(folder)) is None:
        return {}
    before = warmed.read_before(folder)
    return {"warm_up": warm_up | {"evaluation_before": _evaluation([] if before is None else [before])}}


def _endpoints(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what rewards asked of endpoints in training and evaluations; empty where none did."""
    asked = [record for record in records if "endpoint_calls" in record]
    return {"endpoints": {name: sum(r.get(name, 0) for r in asked) for name in ENDPOINT_METRICS}} if asked else {}


def n_updates(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of updates, without skipped ones.

    Args:
        metrics: of metrics.jsonl.
    """
    return sum(len(m.get("updates", [None])) for m in metrics if "loss" in m)


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    fields = ("step", "reward_mean", "low", "high", "pass_at", "n_problems", "n_samples")
    record = {name: evaluations[-1][name] for name in fields}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


def _difference(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the last evaluation's paired difference from step 0; None if unknown."""
    if not evaluations or evaluations[-1].get("difference") is None:
        return None
    last = evaluations[-1]
    return {"value": last["difference"], "low": last.get("difference_low"), "high": last.get("difference_high")}


def _curriculum(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last step's shares of a curriculum; nothing without one."""
    last = metrics[-1] if metrics else {}
    names = ("active", "easy", "hard", "drawn")
    shares = {name: last[f"curriculum_{name}"] for name in names if f"curriculum_{name}" in last}
    return {"curriculum": shares} if shares else {}


def _seconds(timing: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for record in timing:
        for phase, seconds in record.items():
            if phase != "step":
                totals[phase] = totals.get(phase, 0.0) + seconds
    return totals
