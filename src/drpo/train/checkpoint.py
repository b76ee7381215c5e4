"""Checkpoints: written aside, synced, renamed; tensors as safetensors, the rest as JSON, nothing pickled."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from drpo.errors import InputError
from drpo.files import SCRATCH, naming, remove
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train import tensor_files
from drpo.train.stored import (
    STATE,
    SUMS,
    Progress,
    complete,
    fingerprint,
    named,
    read_state,
    require_sound,
    step_of,
    steps,
    sum_of,
)


def save(
    folder: Path,
    progress: Progress,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    also: Callable[[Path], Sequence[Path]] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Path:
    """Write a checkpoint atomically: a crash leaves all of it or none.

    If parameters are sharded, each rank writes its rows; otherwise rank 0 writes all.

    Args:
        folder: the run's checkpoints, visible to all ranks.
        progress: the run's progress.
        trainable: parameters and persistent buffers by name.
        optimizer: over these parameters.
        also: writes more files into the checkpoint's folder; called on every rank. Must return those that rank 0 did
            not write.
        ranks: the processes that save together.

    Returns:
        The checkpoint's folder, `step-NNNNNN`.
    """
    final = folder / f"step-{progress.step:06d}"
    if ranks.all_reduce_max(
        final.exists()
    ):  # a run goes on from its newest checkpoint, so this is the state that stands there
        return final
    scratch = _scratch(final)
    if ranks.is_main:
        remove(scratch)
        folder.mkdir(exist_ok=True)  # in the run's, which must be there: alone it would be no run
        scratch.mkdir()
    ranks.barrier()
    try:
        with naming(final):
            _fill(scratch, progress, trainable, optimizer, also, ranks)
    except BaseException:  # for example a full disk; the partial folder takes space
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if ranks.is_main:
        scratch.rename(final)
        _sync(folder)
    ranks.barrier()
    return final


def _fill(
    scratch: Path,
    progress: Progress,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    also: Callable[[Path], Sequence[Path]] | None,
    ranks: Ranks,
) -> None:
    """Write all files into the checkpoint's folder and sync them to disk."""
    written = [*tensor_files.write(scratch, trainable, optimizer, ranks), *(also(scratch) if also else ())]
    sums = dict(ranks.gather([(path.name, sum_of(path)) for path in written]))
    if ranks.is_main:
        sums |= {path.name: sum_of(path) for path in scratch.iterdir() if path.name not in sums}
        (scratch / STATE).write_text(json.dumps(vars(progress) | {SUMS: sums | {STATE: fingerprint(vars(progress))}}))
        for path in [*scratch.iterdir(), scratch]:
            _sync(path)


def newest_sound(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose checksums match, or None if the run has no checkpoint.

    Args:
        folder: the run's checkpoints.
        say: called with a message for each damaged checkpoint, which is skipped.

    Raises:
        InputError: all checkpoints are damaged.
    """
    checkpoints, why = complete(folder), ""
    for checkpoint in reversed(checkpoints):
        try:
            require_sound(checkpoint)
            return checkpoint
        except InputError as error:
            why = str(error)
            say(f"{why}; going on from the one before")
    if checkpoints:
        raise InputError(f"{why}; no other checkpoint is left; start anew in another folder")
    return None


def restore(
    checkpoint: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    prefix: str = "",
) -> Progress:
    """Restore the parameters and the optimiser from a checkpoint, bit for bit; see `tensor_files.load`.

    Args:
        checkpoint: a folder that `save` wrote.
        trainable: parameters and persistent buffers by name, of the same shapes, whole or this rank's rows.
        optimizer: over these parameters, or None to load the weights alone.
        prefix: prefix of the files' names.

    Returns:
        The run's progress.

    Raises:
        InputError: the checkpoint is of another model, or cannot be read.
    """
    try:
        progress, *_ = read_state(checkpoint)
        tensor_files.load(checkpoint, trainable, optimizer, prefix)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {error}") from None
    return progress


def prune(folder: Path, keep: int, scores: Mapping[int, float]) -> None:
    """Remove old checkpoints, except the last `keep` and the one with the highest score.

    Args:
        folder: the run's checkpoints.
        keep: number of last checkpoints to keep.
        scores: step -> score, where known.
    """
    checkpoints = steps(folder)
    best = max(checkpoints.keys() & scores.keys(), key=lambda step: (scores[step], step), default=None)
    for step in list(checkpoints)[:-keep]:
        if step != best:
            _drop(checkpoints[step])


def tidy(folder: Path, sound: Path | None) -> None:
    """Remove partial checkpoints of a crash, and rename skipped ones to `.step-N.damaged`.

    Args:
        folder: the run's checkpoints.
        sound: the checkpoint that the run resumes from, or None.
    """
    for path in folder.glob(f".step-*{SCRATCH}"):
        remove(path)
    for path in named(folder):
        if not (path / STATE).is_file() or (sound is not None and step_of(path) > step_of(sound)):
            damaged = path.with_name(f".{path.name}.damaged")
            remove(damaged)
            path.rename(damaged)


def drop_all(folder: Path) -> None:
    """Remove all checkpoints of a run atomically."""
    if folder.exists():
        _drop(folder)


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed first, so a crash leaves nothing with a checkpoint's name."""
    gone = _scratch(checkpoint)
    checkpoint.rename(gone)
    remove(gone)


def _scratch(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}{SCRATCH}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
