"""Which floating-point type to compute in."""

import torch

from drpo.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `name` means on `device`; "auto" is bf16 where the processor multiplies it, else fp32.

    Args:
        name: "auto", "fp32", "bf16" or "fp16".
        device: where it runs.

    Raises:
        InputError: another name.

    Example:
        >>> resolve_dtype("fp32", torch.device("cpu"))
        torch.float32
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if name not in DTYPES:
        raise InputError(f"precision={name!r}: must be one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products are done by the hardware; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
