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
    """Write a checkpoint so that a crash at any moment leaves either all of it or none.

    Where parameters are divided over the ranks, each writes its rows; otherwise the first writes all.

    Args:
        folder: of all checkpoints of the run, which all ranks see.
        progress: where the run stands.
        trainable: parameters and persistent buffers by name.
        optimizer: over these parameters.
        also: writes more files into the checkpoint's folder; called on every rank. What the first has not written it
            must return.
        ranks: who save together.

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
    except BaseException:  # a full disk among others: what is half written takes the room that is lacking
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
    """Write everything into the checkpoint's folder and on to the disk."""
    written = [*tensor_files.write(scratch, trainable, optimizer, ranks), *(also(scratch) if also else ())]
    sums = dict(ranks.gather([(path.name, sum_of(path)) for path in written]))
    if ranks.is_main:
        sums |= {path.name: sum_of(path) for path in scratch.iterdir() if path.name not in sums}
        (scratch / STATE).write_text(json.dumps(vars(progress) | {SUMS: sums | {STATE: fingerprint(vars(progress))}}))
        for path in [*scratch.iterdir(), scratch]:
            _sync(path)


def newest_sound(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint whose files are what was written, or None where the run has none at all.

    Args:
        folder: of all checkpoints of the run.
        say: is told of each that is damaged, and so passed over.

    Raises:
        InputError: there are some, and all are damaged.
    """
    found, why = complete(folder), ""
    for checkpoint in reversed(found):
        try:
            require_sound(checkpoint)
            return checkpoint
        except InputError as error:
            why = str(error)
            say(f"{why}; going on from the one before")
    if found:
        raise InputError(f"{why}; no other checkpoint is left; start anew in another folder")
    return None


def restore(
    checkpoint: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    prefix: str = "",
) -> Progress:
    """Put a checkpoint's values into the parameters and the optimiser, to the bit.

    It may have been written by any number of ranks, and be read by any other number.

    Args:
        checkpoint: a folder that `save` made.
        trainable: parameters and persistent buffers by name, of the same shapes; on this rank perhaps some rows of
            each. A buffer that an earlier version did not write stays as it is.
        optimizer: over these parameters, or None to load the weights alone.
        prefix: of the files' names, as they were written.

    Returns:
        Where the run stood.

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
    """Drop old checkpoints.

    Args:
        folder: of all checkpoints of the run.
        keep: how many of the last stay; of the others, the one with the highest score too.
        scores: by step, of those that have one.
    """
    found = steps(folder)
    best = max(found.keys() & scores.keys(), key=lambda step: (scores[step], step), default=None)
    for step in list(found)[:-keep]:
        if step != best:
            _drop(found[step])


def tidy(folder: Path, sound: Path | None) -> None:
    """Clear away what a crash left half written, and set aside as `.step-N.damaged` what was passed over.

    Args:
        folder: of all checkpoints of the run.
        sound: the one that the run goes on from, or None.
    """
    for path in folder.glob(f".step-*{SCRATCH}"):
        remove(path)
    for path in named(folder):
        if not (path / STATE).is_file() or (sound is not None and step_of(path) > step_of(sound)):
            aside = path.with_name(f".{path.name}.damaged")
            remove(aside)
            path.rename(aside)


def drop_all(folder: Path) -> None:
    """Remove all checkpoints of a run at one stroke, as `_drop` does one."""
    if folder.exists():
        _drop(folder)


def _drop(checkpoint: Path) -> None:
    """Remove it at one stroke, as far as its name goes; what a crash leaves of it is not taken for a checkpoint."""
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
