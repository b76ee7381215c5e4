"""Precisions by name: the compute dtype on a device, and the 8-bit grids of weights and activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drpo.errors import InputError, nearest

Grid = Literal["int8", "e4m3"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRIDS: Mapping[str, tuple[Grid, Grid | None]] = {
    "int8": ("int8", None),
    "fp8_weights": ("e4m3", None),
    "fp8": ("e4m3", "e4m3"),
}
NAMES = ("auto", *DTYPES, *GRIDS)
BASE_PRECISIONS = ("fp32", "nf4")
"""How weights that are frozen beside adapters may be held; see `drpo.model.nf4`."""


@dataclass(frozen=True)
class Precision:
    """The number formats that a model computes with.

    Args:
        dtype: the dtype of activations and of all that is not on a grid; bfloat16 or float32 with a grid.
        weights: the grid of the linear layers' weights, one scale per output channel; None keeps them in `dtype`.
        activations: the grid of the linear layers' inputs, one scale per token; None keeps them in `dtype`.
    """

    dtype: torch.dtype
    weights: Grid | None = None
    activations: Grid | None = None


FP32 = Precision(torch.float32)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision called `name` on `device`; the 8-bit ones compute in the dtype of "auto".

    Args:
        name: "auto" (bf16 where the processor multiplies it, else fp32), "fp32", "bf16", "fp16", "int8" (weights),
            "fp8_weights" (e4m3 weights) or "fp8" (e4m3 weights and inputs of linear layers).
        device: the model's device.

    Raises:
        InputError: an unknown name, or numbers that the device does not have.

    Example:
        >>> resolve_precision("fp32", torch.device("cpu"))
        Precision(dtype=torch.float32, weights=None, activations=None)
        >>> resolve_precision("fp8", torch.device("cpu")).activations
        'e4m3'
    """
    if name in DTYPES:
        return Precision(DTYPES[name])
    if name not in NAMES:
        raise InputError(f"precision={name!r}{nearest(name, NAMES)}")
    if device.type == "mps" and name.startswith("fp8"):
        raise InputError(f"precision={name}: Apple's GPUs have no floating point of 8 bits; set bf16, fp32 or int8")
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return Precision(dtype, *GRIDS.get(name, ()))


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bf16 matrices; emulation is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product of x is computed in: autocast's where it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
