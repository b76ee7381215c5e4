"""Devices by name: an NVIDIA or AMD GPU, Apple's, or the CPU."""

import torch
from torch import Tensor

from drpo.errors import InputError, nearest

DEVICES = ("auto", "cuda", "mps", "cpu")


def choose_device(name: str = "auto", processes: int = 1) -> torch.device:
    """Return the device called `name`.

    Args:
        name: "cuda" (NVIDIA, and AMD by ROCm), "mps" (Apple), "cpu", or "auto": the first of these that is there.
        processes: that train together; several cannot share Apple's GPU, and "auto" is the CPU there.

    Raises:
        InputError: an unknown name, or a device that is not there or cannot be shared.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name not in DEVICES:
        raise InputError(f"device={name!r}{nearest(name, DEVICES)}")
    alone = processes == 1
    if name == "mps" and not alone:
        raise InputError(
            f"device=mps: {processes} processes cannot train on it together; set --device cpu, or start one"
        )
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_there in there.items() if is_there and (kind != "mps" or alone)))
    if not there[name]:
        has = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise InputError(f"device={name}: torch {torch.__version__} finds none here; it finds {has}")
    return torch.device(name)


def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64; Apple's GPUs do not.

    Example:
        >>> has_float64(torch.device("cpu")), has_float64(torch.device("mps"))
        (True, False)
    """
    return device.type != "mps"


def where_float64(tensor: Tensor) -> Tensor:
    """Return a tensor where it can become float64: as it is, or copied to the CPU."""
    return tensor if has_float64(tensor.device) else tensor.cpu()
