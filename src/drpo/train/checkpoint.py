"""Checkpoints: written aside, synced, renamed; tensors as safetensors, the rest as JSON, nothing pickled."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drpo.errors import InputError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows besides tensors.

    Args:
        step: rollouts trained on; also the cursor into the task's problems and every random stream's position.
        updates: optimiser updates done.
        tokens: sampled so far.
        score: held-out accuracy of these weights, where it was measured.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    score: float | None = None


def save(
    folder: Path,
    progress: Progress,
    trainable: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    keep: int,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint so that a crash at any moment leaves either all of it or none, then drop old ones.

    Args:
        folder: of all checkpoints of the run.
        progress: where the run stands.
        trainable: parameters by name.
        optimizer: over these parameters.
        keep: how many of the last stay; the one with the highest score stays too.
        also: writes more files into the checkpoint's folder.

    Returns:
        The checkpoint's folder, `step-NNNNNN`.
    """
    final = folder / f"step-{progress.step:06d}"
    if final.exists():  # a run goes on from its newest checkpoint, so this is the state that stands there
        return final
    scratch = folder / f".{final.name}.writing"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    names = {id(p): name for name, p in trainable.items()}
    moments = {f"{key}:{names[id(p)]}": value for p, state in optimizer.state.items() for key, value in state.items()}
    save_file({n: p.detach().contiguous() for n, p in trainable.items()}, scratch / WEIGHTS)
    save_file({"rng:torch": torch.get_rng_state(), **moments}, scratch / OPTIMIZER)
    if also is not None:
        also(scratch)
    (scratch / STATE).write_text(json.dumps(vars(progress)))
    for path in [*scratch.iterdir(), scratch]:
        _sync(path)
    scratch.rename(final)
    _sync(folder)
    _prune(folder, keep)
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's checkpoint folder, or None."""
    found = _all(folder)
    return found[-1] if found else None


def steps(folder: Path) -> dict[int, Path]:
    """Return every complete checkpoint in a run's checkpoint folder, by its step."""
    return {int(path.name.removeprefix("step-")): path for path in _all(folder)}


def restore(
    checkpoint: Path, trainable: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> Progress:
    """Put a checkpoint's values into the parameters and the optimiser, to the bit.

    Args:
        checkpoint: a folder that `save` made.
        trainable: parameters by name, of the same shapes.
        optimizer: over these parameters, or None to load the weights alone.

    Returns:
        Where the run stood.

    Raises:
        InputError: the checkpoint is of another model, or cannot be read.
    """
    try:
        weights = load_file(checkpoint / WEIGHTS)
        moments = load_file(checkpoint / OPTIMIZER) if optimizer is not None else {}
        progress = Progress(**json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {error}") from None
    if weights.keys() != trainable.keys():
        odd = sorted(weights.keys() ^ trainable.keys())[0]
        raise InputError(f"checkpoint {checkpoint} is of another model: parameter {odd!r} is only on one side")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
    if optimizer is not None:
        torch.set_rng_state(moments.pop("rng:torch"))
        _restore_moments(optimizer, trainable, moments)
    return progress


def _restore_moments(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], moments: Mapping[str, Tensor]
) -> None:
    for key, value in moments.items():
        kind, _, name = key.partition(":")
        parameter = trainable[name]
        # AdamW keeps its step count on the CPU unless fused on another device, and its moments with the parameter.
        optimizer.state[parameter][kind] = value.to(parameter.device)


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if (p / STATE).is_file())


def _prune(folder: Path, keep: int) -> None:
    found = _all(folder)
    scores = {p: _score(p) for p in found}
    best = max(found, key=lambda p: (scores[p] is not None, scores[p] or 0.0, p.name))
    for path in found[:-keep]:
        if path != best or scores[path] is None:
            shutil.rmtree(path)


def _score(checkpoint: Path) -> float | None:
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    score: float | None = state["score"]
    return score


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
