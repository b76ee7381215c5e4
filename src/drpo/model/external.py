"""Models in the checkpoints of other trainers: finding them and merging their shards."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from drpo.errors import InputError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
ADAPTER = "adapter_config.json"
PIECES = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_STEP = re.compile(r"(?:checkpoint|global_step|step)[-_]?(\d+)(?:_hf)?")
_ROOMS = ("model", "actor", "policy", "huggingface", "weights", "hf")
_MEGATRON = (
    "Megatron's pieces; merge them with its trainer's own tool (verl: `python -m verl.model_merger merge --backend "
    "megatron --local_dir ... --target_dir ...`)"
)
_OTHER = {
    "*.distcp": _MEGATRON,
    "dist_ckpt": _MEGATRON,
    "zero_to_fp32.py": "DeepSpeed's pieces; merge them with the `zero_to_fp32.py` that lies there",
}


def locate(folder: Path) -> Path:
    """Return the model's folder in a checkpoint, or in the newest checkpoint of a run.

    A model's folder holds `config.json` and weights, as transformers saves them; or a PEFT adapter; or the FSDP shards
    of verl and SkyRL, with a folder `huggingface` beside them. A run's folder holds steps (`checkpoint-N`,
    `global_step_N`, `step_N`); a step may hold `actor`, `policy`, `huggingface`, ...

    Args:
        folder: a checkpoint or run of drpo, TRL, verl, SkyRL, prime-rl or OpenRLHF; or a plain model's folder.

    Raises:
        InputError: there is no model, or only its trainer can merge its shards; the message says how.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> for step in ("global_step_9", "global_step_10"):
        ...     (run / step / "actor" / "huggingface").mkdir(parents=True)
        ...     for name in ("config.json", "model.safetensors"):
        ...         (run / step / "actor" / "huggingface" / name).touch()
        >>> locate(run).relative_to(run).as_posix()
        'global_step_10/actor/huggingface'
    """
    here = folder
    while not _holds_model(here):
        inner = _newest(here) or next((here / room for room in _ROOMS if (here / room).is_dir()), None)
        if inner is None:
            raise InputError(f"{folder}: no model is there{_why(here)}")
        here = inner
    return here


def described(source: str) -> str:
    """Return the folder of configuration and tokenizer: `huggingface` beside FSDP shards, else the model's."""
    return str(Path(source) / "huggingface") if pieces_of(Path(source)) else source


def base_of(folder: Path) -> str | None:
    """Return the base model of a folder's adapter; None without an adapter.

    Raises:
        InputError: the adapter names no base model.
    """
    file = folder / ADAPTER
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = None
    # A colon would name code, module:function, which a folder of weights must not run.
    if not isinstance(base, str) or not base or (":" in base and not Path(base).is_dir()):
        raise InputError(f"{file}: base_model_name_or_path={base!r} must name the model that the adapter is for")
    return base


def pieces_of(folder: Path) -> list[Path]:
    """Return a folder's FSDP shards, by rank; empty if it holds none.

    Raises:
        InputError: some are missing.
    """
    files = {int(m[2]): (int(m[1]), p) for p in folder.glob("model_world_size_*.pt") if (m := PIECES.fullmatch(p.name))}
    sizes = {size for size, _ in files.values()}
    if files and (len(sizes) > 1 or sorted(files) != list(range(max(sizes)))):
        raise InputError(
            f"{folder}: pieces of ranks {sorted(files)} are there, of {sorted(sizes)}; copy the others too"
        )
    return [files[rank][1] for rank in sorted(files)]


def merge(pieces: Sequence[Path]) -> dict[str, Tensor]:
    """Merge the FSDP shards of a model. Only tensors are unpickled.

    Args:
        pieces: the files of all ranks, in order.

    Returns:
        Parameter name -> whole tensor, in the dtype that was saved.

    Raises:
        InputError: a file cannot be read, or holds more than tensors.
    """
    states = [_read(piece) for piece in pieces]
    return {name: _whole(name, [state[name] for state in states]) for name in states[0]}


def _read(piece: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(piece, map_location="cpu", weights_only=True)
    except Exception as error:  # no zip, no pickle, or a pickle that would run code
        raise InputError(f"{piece} cannot be read as tensors alone: {str(error).strip().splitlines()[0]}") from None
    return state


def _whole(name: str, parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    if not isinstance(first, DTensor):
        return first  # every rank has it whole
    if any(type(placement) not in (Shard, Replicate) for placement in first.placements):
        raise InputError(
            f"{name}: laid out as {first.placements}, which cannot be merged here; use its trainer's own tool"
        )
    ranks = first.device_mesh.mesh
    local = [part.to_local() for part in parts if isinstance(part, DTensor)]
    return _join([local[int(rank)] for rank in ranks.flatten()], tuple(ranks.shape), first.placements)


def _join(local: list[Tensor], shape: tuple[int, ...], placements: Sequence[object]) -> Tensor:
    """Return the whole tensor from its parts over a mesh of ranks, recursing over the mesh's dimensions."""
    if not shape:
        return local[0]
    step = len(local) // shape[0]
    rows = [_join(local[i * step : (i + 1) * step], shape[1:], placements[1:]) for i in range(shape[0])]
    return torch.cat(rows, placements[0].dim) if isinstance(placements[0], Shard) else rows[0]


def _holds_model(folder: Path) -> bool:
    if (folder / ADAPTER).is_file():
        return True
    if (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return True
    whole = folder / "huggingface"
    return bool(pieces_of(folder)) and (whole / "config.json").is_file() and not _holds_model(whole)


def _newest(folder: Path) -> Path | None:
    steps = {int(m[1]): path for path in folder.iterdir() if path.is_dir() and (m := _STEP.fullmatch(path.name))}
    return steps[max(steps)] if steps else None


def _why(folder: Path) -> str:
    other = next((what for pattern, what in _OTHER.items() if any(folder.glob(pattern))), None)
    return f", only {other}" if other else " (no config.json with weights, in it or in its newest step)"
