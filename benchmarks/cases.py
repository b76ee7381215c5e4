"""What is measured: records only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "drpo"
"""The environment that the harness itself runs in; every other name is a peer's."""


@dataclass(frozen=True)
class Worker:
    """A program that serves repetitions.

    Args:
        environment: `OURS` or a peer's name.
        module: in `benchmarks.workers`.
        setup: what it is told once, at its start.
    """

    environment: str
    module: str
    setup: Mapping[str, Any]


@dataclass(frozen=True)
class Entrant:
    """One line of a case: a worker with what it is asked to do.

    Args:
        name: as it stands in the table.
        worker: who does it.
        request: one repetition; the harness adds "round", from 1.
        warm_up: what differs in the request before the rounds.
    """

    name: str
    worker: Worker
    request: Mapping[str, Any]
    warm_up: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Entrants that are measured in turns, so that whatever the machine does meanwhile meets all of them.

    Args:
        part: which table it belongs to.
        name: unique within the part.
        baseline: the entrant that ratios are taken to.
        entrants: in the order of their turns.
        parameters: shapes and the like, for the table.
        skipped: entrants that cannot take part -> why.
    """

    part: str
    name: str
    baseline: str
    entrants: tuple[Entrant, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
