"""Run some of the runs in this process and write down what is compared; knows nothing of drpo.

python old.py FOLDER RUN ...        one side's own module does what differs between the sides
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import world
from runs import Run, all_runs
from safetensors import safe_open

LARGEST_SHOWN = 2**22
"""Bytes of a file of weights whose numbers are kept beside their sums, so that a difference has a size."""
PERTURB = "REFACTOR_PERTURB"
"""Environment variable: the learning rate is multiplied by it, on the new side, to see that the comparison can fail."""

STATUS = "exit status"

Place = dict[str, Any]
"""key -> value, at one place: a step's metrics, a completion's record."""
Observed = dict[str, dict[str, Place]]
"""kind -> place -> key -> value."""


@dataclass(frozen=True)
class Update:
    """What one optimiser update trained on and did.

    Args:
        figures: loss, grad_norm, learning_rate, taken, n_tokens, n_skipped.
        advantages: `who` -> the completion's advantage, those that were skipped too.
        tokens: `who` -> column -> a value for each of the completion's tokens, of those that went through the model.
    """

    figures: Place
    advantages: Place
    tokens: Mapping[str, Place]


class Side(Protocol):
    """What a side's module has."""

    ROLLOUT_PLACE: tuple[str, str, str]

    def train(self, recipe: str, settings: Mapping[str, Any], folder: Path) -> int: ...
    def resume(self, folder: Path) -> int: ...
    def weights(self, folder: Path) -> dict[str, Path]: ...
    def watch(self, saw: Any) -> None: ...


def who(problem: str, sample: int) -> str:
    return f"problem {problem}, sample {sample}"


def main(side: Any) -> None:
    """Run what the command line names and write RUN.json each."""
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    seen: Observed = {}
    side.watch(lambda step, updates: _keep_updates(seen, step, updates))
    wanted = {run.name: run for run in all_runs()}
    for name in names:
        print(f"== {name}", flush=True)
        seen.clear()
        world.start()
        _one(side, wanted[name], Path(folder), seen)


def _one(side: Side, run: Run, folder: Path, seen: Observed) -> None:
    where = folder / run.name
    name = Path(sys.argv[0]).stem
    settings = {k: v.format(side=name) if isinstance(v, str) else v for k, v in run.settings.items()}
    if PERTURB in os.environ:
        settings["learning_rate"] *= float(os.environ[PERTURB])
    statuses = {"train": side.train(run.recipe, settings, where)}
    if run.resumed:
        statuses["resume"] = side.resume(where)
    if int(os.environ.get("RANK", "0")) == 0:
        found = {STATUS: {"the command": statuses}, **seen, **_recorded(where, side)}
        (folder / f"{run.name}.json").write_text(json.dumps(found))
        shutil.rmtree(where, ignore_errors=True)


def _keep_updates(seen: Observed, step: int, updates: list[Update]) -> None:
    for i, update in enumerate(updates):
        place = f"step {step}, update {i}"
        seen.setdefault("update", {})[place] = update.figures
        seen.setdefault("advantage", {})[place] = update.advantages
        for completion, columns in update.tokens.items():
            seen.setdefault("token", {})[f"{place}, {completion}"] = columns


def _recorded(folder: Path, side: Side) -> Observed:
    """What the run's folder says: metrics, evaluations, rollouts, weights."""
    step, problem, sample = side.ROLLOUT_PLACE
    found: Observed = {}
    for kind in ("metrics", "evaluations"):
        found[kind] = {f"step {r['step']}": r for r in _lines(folder / f"{kind}.jsonl")}
    records = _lines(folder / "rollouts.jsonl")
    found["rollouts"] = {f"step {r[step]}, {who(r[problem], r[sample])}": r for r in records}
    found["weights"] = {name: _tensors(path) for name, path in side.weights(folder).items()}
    return found


def _lines(path: Path) -> list[Place]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _tensors(path: Path) -> Place:
    """Name -> dtype, shape, SHA-256 of the bytes, and the numbers where the file is small."""
    shown = path.stat().st_size <= LARGEST_SHOWN
    found = {}
    with safe_open(str(path), "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_tensor(name)
            digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            found[name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": digest}
            if shown:
                found[name]["numbers"] = tensor.flatten().tolist()
    return found
