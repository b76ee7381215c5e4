"""What there is to measure: part -> its cases, for the machine at hand."""

from collections.abc import Callable, Mapping

from benchmarks.cases import Case
from benchmarks.parts import (
    checkpointing,
    edges,
    growth,
    head,
    head_objectives,
    head_parts,
    mismatch,
    neighbours,
    overlap,
    resampling,
    rollout,
    step,
    turns,
)
from benchmarks.parts.scale import Scale

PARTS: Mapping[str, Callable[[Scale], list[Case]]] = {
    "step": step.cases,
    "rollout": rollout.cases,
    "head": head.cases,
    "head_parts": head_parts.cases,
    "head_objectives": head_objectives.cases,
    "growth": growth.cases,
    "mismatch": mismatch.cases,
    "overlap": overlap.cases,
    "neighbours": neighbours.cases,
    "turns": turns.cases,
    "resampling": resampling.cases,
    "checkpointing": checkpointing.cases,
    "edges": edges.cases,
}

__all__ = ["PARTS", "Scale"]
