"""Tensors as safetensors files: parameters, buffers and optimiser state, whole or sharded over the ranks."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, empty
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from drpo.errors import InputError
from drpo.files import naming, set_usual_mode
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.stored import OPTIMIZER, WEIGHTS


def write(
    folder: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks = SINGLE_PROCESS,
    prefix: str = "",
) -> list[Path]:
    """Write this rank's rows of every tensor, with the first row's number; return the files.

    If no tensor is sharded, rank 0 writes all.

    Args:
        folder: the folder to write to.
        trainable: parameters and persistent buffers by name.
        optimizer: over these parameters.
        ranks: the processes that write together.
        prefix: prefix of the files' names.
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
        local_tensors = {name: t for name, t in tensors.items() if isinstance(t, DTensor) or ranks.is_main}
        rows = {name: _rows(tensor.detach()) for name, tensor in local_tensors.items()}
        starts = {name: start for name, (_, start) in rows.items() if start}
        path = folder / f"{prefix}{kind.replace('.', f'{part}.')}"
        shards = {name: local.contiguous() for name, (local, _) in rows.items()}
        with naming(path):
            save_file(shards, path, {"starts": json.dumps(starts)})
            set_usual_mode(path)
        written.append(path)
    return written


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the local shard and its first global row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    local = tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return local, int(offset[0]) if len(local) else 0


def load(
    folder: Path,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    prefix: str = "",
) -> None:
    """Copy a folder's tensors into the parameters and the optimiser, bit for bit.

    Any number of ranks may have written the files, and any other number may read them.

    Args:
        folder: the folder that `write` wrote to.
        trainable: parameters and persistent buffers by name, of the same shapes, whole or this rank's rows. A buffer
            without stored values stays as it is.
        optimizer: over these parameters, or None to load the weights alone.
        prefix: prefix of the files' names.

    Raises:
        InputError: the tensors are another model's.
        OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError: a file cannot be read.
    """
    with ExitStack() as stack:
        weights = _TensorFiles(folder, prefix + WEIGHTS, stack)
        expected = {n: t for n, t in trainable.items() if n in weights.names or isinstance(t, nn.Parameter)}
        if weights.names != expected.keys():
            odd = sorted(weights.names ^ expected.keys())[0]
            raise InputError(f"checkpoint {folder} is of another model: parameter {odd!r} is only on one side")
        with torch.no_grad():
            for name, parameter in expected.items():
                weights.copy(name, parameter)
        if optimizer is not None:
            _load_moments(optimizer, trainable, _TensorFiles(folder, prefix + OPTIMIZER, stack))


class _TensorFiles:
    """The tensors of one kind in a folder; their rows may be in several files."""

    def __init__(self, folder: Path, kind: str, stack: ExitStack) -> None:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob(kind.replace(".", "*.")))]
        if not files:
            raise FileNotFoundError(f"no {kind} in it")
        self._parts: dict[str, list[tuple[Any, int]]] = {}  # name -> each file with some of its rows, and their first
        for file in files:
            starts = json.loads((file.metadata() or {}).get("starts", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                self._parts.setdefault(name, []).append((file, starts.get(name, 0)))
        self.names = self._parts.keys()

    def whole(self, name: str) -> Tensor:
        """Return a tensor that is not sharded, apart from the file, which would stay mapped as long as the tensor."""
        tensor: Tensor = self._parts[name][0][0].get_tensor(name)
        return tensor.clone()

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """Return an empty tensor of a stored one's dtype and shape, divided over the ranks as a parameter's rows."""
        if parameter.dim() == 0:
            return self.whole(name).to(parameter.device)
        some = self._parts[name][0][0].get_slice(name)[:0]
        shape = (len(parameter), *some.shape[1:])
        if not isinstance(parameter, DTensor):
            return torch.empty(shape, dtype=some.dtype, device=parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        return empty(shape, dtype=some.dtype, device_mesh=mesh, placements=placements)

    def copy(self, name: str, into: Tensor) -> None:
        """Copy a tensor's rows, or this rank's shard of them, into `into`."""
        local, first = _rows(into)
        if local.dim() == 0:
            local.copy_(self.whole(name))
            return
        missing = len(local)
        for file, start in self._parts[name]:
            rows = file.get_slice(name)
            begin, end = max(first, start), min(first + len(local), start + rows.get_shape()[0])
            if begin < end:
                local[begin - first : end - first].copy_(rows[begin - start : end - start])
                missing -= end - begin
        if missing:
            raise InputError(f"checkpoint: {missing} rows of {name!r} are in none of its files; it is of another model")


def _load_moments(optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor], moments: _TensorFiles) -> None:
    torch.set_rng_state(moments.whole("rng:torch"))
    for key in sorted(moments.names - {"rng:torch"}):
        kind, _, name = key.partition(":")
        parameter = trainable[name]
        # AdamW keeps its step count on the CPU unless fused on another device, and its moments with the parameter.
        if kind == "step":
            value = moments.whole(key).to(parameter.device)
        else:
            value = moments.like(key, parameter)
            moments.copy(key, value)
        optimizer.state[parameter][kind] = value
