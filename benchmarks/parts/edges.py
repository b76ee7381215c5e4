"""What stands around a training step: quick rewards, the report and the resuming of a long run, a small comparison."""

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.parts.scale import Scale

CALLS, REPORTED, RESUMED, TRIALS = 20_000, 20_000, 200_000, 4
WARM_UP = 128
"""Calls, or rollouts, before the rounds: processes have started, and what is imported late is there."""


def cases(scale: Scale) -> list[Case]:
    """Return a case for each; the first entrant does the least that such work takes.

    Args:
        scale: of the machine.
    """
    calls, reported, resumed, trials = (400, 128, 256, 2) if scale.quick else (CALLS, REPORTED, RESUMED, TRIALS)
    scored = [
        _case(f"{calls:,} rewards of a microsecond, {n} process{'es' if n > 1 else ''}", calls, found, processes=n)
        for n in (1, 2)
        for found in ({"multiprocessing, one by one": "multiprocessing", "reward pool": "reward pool"},)
    ]
    return [
        *scored,
        _case(f"report of {reported:,} rollouts", reported, {"json.loads of its records": "json", "report": "report"}),
        _case(
            f"resuming after {resumed:,} rollouts", resumed, {"SHA-256 of its records": "sha256", "resume": "resume"}
        ),
        _compared(trials),
    ]


def _case(name: str, n: int, entrants: Mapping[str, str], **setup: Any) -> Case:
    found = tuple(
        Entrant(who, Worker(OURS, "drpo_edges", {"what": what, **setup}), {"n": n}, {"n": WARM_UP})
        for who, what in entrants.items()
    )
    return Case("edges", name, found[0].name, found, {"n": n, **setup})


def _compared(trials: int) -> Case:
    worker = Worker(OURS, "drpo_edges", {"what": "compare"})
    found = tuple(Entrant(f"{n} trial{'s' if n > 1 else ''}", worker, {"n": n}, {"n": 1}) for n in (1, trials))
    return Case("edges", "compare smoke, trials of 4 steps", found[0].name, found, {"n": trials})
