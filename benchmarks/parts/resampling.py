"""What dynamic sampling makes of a task: groups with a signal, and the time of each, sampled once and again."""

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.methods import ATTEMPTS
from drpo.model.names import SMOLLM2, TINY

ONCE, AGAIN = "sampled once", f"--dynamic-sampling {ATTEMPTS}"
SUMMANDS = {"the demo, a + b up to 20": (1, 20), "a hard task, a + b from 10 to 99": (10, 99)}
"""Name of a case -> the bounds of its summands."""


def cases(scale: Scale) -> list[Case]:
    """Return a case for each task; both its entrants train from the same weights, with the same seed in a round.

    Args:
        scale: of the machine.
    """
    setup = {
        "model": str(folder(TINY if scale.quick else SMOLLM2)),
        "prompts": 2 if scale.quick else 8,
        "samples": 2 if scale.quick else 8,
        "new_tokens": 4 if scale.quick else 32,
    }
    steps = 1 if scale.quick else 2
    parameters = {n: setup[n] for n in ("prompts", "samples", "new_tokens")} | {"steps": steps}
    return [
        Case("resampling", name, ONCE, _entrants({**setup, "low": low, "high": high}, steps), parameters)
        for name, (low, high) in SUMMANDS.items()
    ]


def _entrants(setup: Mapping[str, Any], steps: int) -> tuple[Entrant, ...]:
    worker = Worker(OURS, "drpo_resampling", setup)
    again = {ONCE: 0, AGAIN: ATTEMPTS}
    return tuple(
        Entrant(who, worker, {"again": n, "steps": steps}, {"again": 0, "steps": 1}) for who, n in again.items()
    )
