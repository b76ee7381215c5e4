"""How time and memory of one update grow as one size at a time doubles."""

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import OURS, Case, Entrant, Worker
from benchmarks.folders import folder
from benchmarks.parts.scale import Scale
from drpo.model.names import SMOLLM2, TINY

UPDATE = {"prompts": 2, "samples": 8, "prompt_tokens": 48, "new_tokens": 32}
QUICK_UPDATE = {"prompts": 2, "samples": 4, "prompt_tokens": 4, "new_tokens": 4}
HEAD = {"tokens": 1024, "vocabulary": 24_576, "hidden": 576, "row": 512}
QUICK_HEAD = {"tokens": 64, "vocabulary": 256, "hidden": 32, "row": 64}

# What doubles -> (field of the request, where it starts). More prompts are more tokens with all else equal.
AXES = {
    "tokens": ("prompts", 1),
    "group size": ("samples", 4),
    "prompt length": ("prompt_tokens", 32),
    "response length": ("new_tokens", 32),
}


def cases(scale: Scale) -> list[Case]:
    """Return a case for each thing that doubles; its sizes take turns.

    Args:
        scale: of the machine.
    """
    steps = 2 if scale.quick else 5
    precision = scale.precisions[0]
    setup = {
        "model": str(folder(TINY if scale.quick else SMOLLM2)),
        "precision": precision,
        "reward": "hash",
        "low": 1,
        "high": 50,
        "prompts": 8,
        "samples": 8,
        "new_tokens": 32,
        "learning_rate": 1e-6,
    }
    update = Worker(OURS, "drpo_growth", setup)
    base = QUICK_UPDATE if scale.quick else UPDATE
    found = []
    for axis, (field, start) in AXES.items():
        first = base[field] if scale.quick else start
        found.append(_case(axis, field, base, [first * 2**i for i in range(steps)], update))
    head = QUICK_HEAD if scale.quick else HEAD
    operator = {**head, "dtype": precision, "method": "linear_policy_loss"}
    sizes = [head["vocabulary"] * 2**i for i in range(min(steps, 4))]
    loss = Worker(OURS, "head", {})
    return [*found, _case("vocabulary, the head alone", "vocabulary", operator, sizes, loss)]


def _case(axis: str, field: str, base: Mapping[str, Any], sizes: list[int], worker: Worker) -> Case:
    what = field.replace("_", " ")
    entrants = tuple(Entrant(f"{size:,} {what}", worker, {**base, field: size}) for size in sizes)
    parameters = {name: value for name, value in base.items() if name != field}
    constant = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parameters.items())
    return Case("growth", f"{axis} ({constant})", entrants[0].name, entrants, parameters)
