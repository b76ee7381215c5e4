"""Checkpoints: written aside, synced, renamed; tensors as safetensors, the rest as JSON, nothing pickled."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from drpo.errors import InputError
from drpo.files import SCRATCH, naming, remove
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.stored import (
    OPTIMIZER,
    STATE,
    SUMS,
    WEIGHTS,
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
    written = [*write(scratch, trainable, optimizer, ranks), *(also(scratch) if also else ())]
    sums = dict(ranks.gather([(path.name, sum_of(path)) for path in written]))
    if ranks.is_main:
        sums |= {path.name: sum_of(path) for path in scratch.iterdir() if path.name not in sums}
        (scratch / STATE).write_text(json.dumps(vars(progress) | {SUMS: sums | {STATE: fingerprint(vars(progress))}}))
        for path in [*scratch.iterdir(), scratch]:
            _sync(path)


def write(
    scratch: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks = SINGLE_PROCESS,
    prefix: str = "",
) -> list[Path]:
    """Write this rank's rows of everything, and where each tensor's rows begin; return the files.

    Where nothing is divided over the ranks, the first writes all.

    Args:
        scratch: the folder that takes the files.
        trainable: parameters and persistent buffers by name.
        optimizer: over these parameters.
        ranks: who write together.
        prefix: the files' names begin so.
    """
    if not any(isinstance(p, DTensor) for p in trainable.values()):
        if not ranks.is_main:
            return []
        ranks = SINGLE_PROCESS
    names = {id(p): name for name, p in trainable.items()}
    moments = {f"{key}:{names[id(p)]}": value for p, state in optimizer.state.items() for key, value in state.items()}
    generator = {"rng:torch": torch.get_rng_state()} if ranks.is_main else {}
    part = "" if ranks.size == 1 else f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}"
    written = []
    for kind, tensors in ((WEIGHTS, dict(trainable)), (OPTIMIZER, {**generator, **moments})):
        own = {name: t for name, t in tensors.items() if isinstance(t, DTensor) or ranks.is_main}
        rows = {name: _rows(tensor.detach()) for name, tensor in own.items()}
        starts = {name: start for name, (_, start) in rows.items() if start}
        path = scratch / f"{prefix}{kind.replace('.', f'{part}.')}"
        whole = {name: local.contiguous() for name, (local, _) in rows.items()}
        with naming(path):
            save_file(whole, path, {"starts": json.dumps(starts)})
        written.append(path)
    return written


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank has of a tensor, and which of its rows is the first of that."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    local = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, int(offset[0]) if len(local) else 0


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
        with ExitStack() as stack:
            weights = _Pieces(checkpoint, prefix + WEIGHTS, stack)
            there = {n: t for n, t in trainable.items() if n in weights.names or isinstance(t, nn.Parameter)}
            if weights.names != there.keys():
                odd = sorted(weights.names ^ there.keys())[0]
                raise InputError(f"checkpoint {checkpoint} is of another model: parameter {odd!r} is only on one side")
            with torch.no_grad():
                for name, parameter in there.items():
                    weights.copy(name, parameter)
            if optimizer is not None:
                _restore_moments(optimizer, trainable, _Pieces(checkpoint, prefix + OPTIMIZER, stack))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"checkpoint {checkpoint} cannot be read: {error}") from None
    return progress


class _Pieces:
    """The tensors of one kind in a checkpoint, whichever files their rows are in."""

    def __init__(self, checkpoint: Path, kind: str, stack: ExitStack) -> None:
        self._files = [
            stack.enter_context(safe_open(path, "pt")) for path in sorted(checkpoint.glob(kind.replace(".", "*.")))
        ]
        if not self._files:
            raise FileNotFoundError(f"no {kind} in it")
        self._starts = [json.loads((file.metadata() or {}).get("starts", "{}")) for file in self._files]
        self.names = {name for file in self._files for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def whole(self, name: str) -> Tensor:
        """One that no rank has only rows of."""
        tensor: Tensor = next(file for file in self._files if name in file.keys()).get_tensor(name)  # noqa: SIM118
        return tensor

    def copy(self, name: str, into: Tensor) -> None:
        """Copy the rows that this rank has of a tensor."""
        local, first = _rows(into)
        if local.dim() == 0:
            local.copy_(self.whole(name))
            return
        missing = len(local)
        for file, starts in zip(self._files, self._starts, strict=True):
            if name not in file.keys():  # noqa: SIM118
                continue
            rows, start = file.get_slice(name), starts.get(name, 0)
            begin, end = max(first, start), min(first + len(local), start + rows.get_shape()[0])
            if begin < end:
                local[begin - first : end - first].copy_(rows[begin - start : end - start])
                missing -= end - begin
        if missing:
            raise InputError(f"checkpoint: {missing} rows of {name!r} are in none of its files; it is of another model")


def _restore_moments(optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor], moments: _Pieces) -> None:
    torch.set_rng_state(moments.whole("rng:torch"))
    for key in sorted(moments.names - {"rng:torch"}):
        kind, _, name = key.partition(":")
        parameter = trainable[name]
        # AdamW keeps its step count on the CPU unless fused on another device, and its moments with the parameter.
        if kind == "step":
            value = moments.whole(key).to(parameter.device)
        else:
            value = torch.empty_like(parameter, requires_grad=False)
            moments.copy(key, value)
        optimizer.state[parameter][kind] = value


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
