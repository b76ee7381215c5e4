"""The row operations of `rows.py` as Triton kernels for CUDA GPUs.

Each logit is read once for the statistics and once for a slope. Memory traffic bounds both, so the kernels keep the
arithmetic below it: one exponential per logit, and no barrier inside a row. The products return float32 logits on a
GPU, so `exact` logits are not needed.

With `TRITON_INTERPRET=1` set before triton is imported, the kernels run on the CPU, slowly.
"""

from __future__ import annotations  # the kernels' parameters name `tl`, which may be missing

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drpo.errors import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # an optional backend: `supported` returns False
    triton = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 8
VECTOR_BYTES = 16
"""The widest load of one thread."""
LANES = 4 * 32 * WARPS
"""Running sums per row: four per thread, so that loads overlap with arithmetic."""
BLOCK = 4096
"""Logits per program of the slope: 16 to 64 bytes in flight per thread."""


def _jit(kernel: Callable[..., Any]) -> Any:
    """Return triton's kernel, or the plain function without triton, where nothing calls it."""
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _absorb(top: tl.tensor, total: tl.tensor, tilt: tl.tensor, x: tl.tensor, steepness: tl.tensor) -> Any:
    """Add the logits x [lanes, width] to each lane's maximum m, sum e^(z - m) and sum e^(z - m) (x - m)."""
    new_top = tl.maximum(top, tl.max(x, 1))
    fall = top - new_top
    shrink = tl.exp2(fall * steepness)
    gap = x - new_top[:, None]
    weight = tl.exp2(gap * steepness)  # propagates a NaN, which the maximum drops
    tilt = shrink * (tilt + fall * total) + tl.sum(weight * tl.maximum(gap, -1e38), 1)  # 0 * -inf would be a NaN
    return new_top, shrink * total + tl.sum(weight, 1), tilt


@_jit
def _statistics(
    logits: tl.tensor,
    row_stride: tl.tensor,
    target: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    normaliser: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    lanes: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """Reduce one row per program. Each lane keeps its own sums until the end, so no logit waits for a barrier.

    Logits are subtracted before they are scaled: these differences are nearly exact, and 0 at the maximum. One thread
    loads `width` neighbours as one vector, so a lane's maximum needs no other thread.
    """
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2^31 from 14,135 rows of 151,936
    here = logits + row * row_stride
    steepness = scale * 1.4426950408889634  # e^x = 2^(x log2 e)
    columns = tl.arange(0, lanes)[:, None] * width + tl.arange(0, width)[None, :]
    top = tl.full([lanes], -1e38, tl.float32)  # finite, so that a lane of -inf alone computes no inf - inf
    total = tl.zeros([lanes], tl.float32)
    tilt = tl.zeros([lanes], tl.float32)
    token = tl.load(target + row)
    known = (token >= 0) & (token < size)
    x_target = tl.load(here + token, mask=known, other=float("nan")).to(tl.float32)
    whole = size // (lanes * width) * (lanes * width)
    for start in range(0, whole, lanes * width):
        x = tl.load(here + start + columns).to(tl.float32)
        top, total, tilt = _absorb(top, total, tilt, x, steepness)
    columns += whole
    x = tl.load(here + columns, mask=columns < size, other=-float("inf")).to(tl.float32)
    top, total, tilt = _absorb(top, total, tilt, x, steepness)

    peak = tl.max(top, 0)
    fall = top - peak
    shrink = tl.exp2(fall * steepness)
    mass = tl.sum(shrink * total, 0)
    mean_gap = tl.sum(shrink * (tilt + fall * total), 0) / mass
    log_mass = tl.log(mass)
    tl.store(normaliser + row, peak * scale + log_mass)
    tl.store(logp + row, (x_target - peak) * scale - log_mass)
    tl.store(entropy + row, log_mass - scale * mean_gap)  # both terms >= 0: mass >= 1, every gap <= 0


@_jit
def _residual(
    logits: tl.tensor,
    row_stride: tl.tensor,
    normaliser: tl.tensor,
    target: tl.tensor,
    result: tl.tensor,
    result_stride: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write p - onehot, `block` columns of one row per program; one thread reads and writes each element."""
    pieces = tl.cdiv(size, block)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * block + tl.arange(0, block)
    inside = columns < size
    x = tl.load(logits + row * row_stride + columns, mask=inside).to(tl.float32)
    hit = columns == tl.load(target + row)
    p = tl.exp2((x * scale - tl.load(normaliser + row)) * 1.4426950408889634)
    residual = tl.where(hit, p - 1, p)
    tl.store(result + row * result_stride + columns, residual.to(result.dtype.element_ty), mask=inside)


@_jit
def _slope(
    logits: tl.tensor,
    row_stride: tl.tensor,
    normaliser: tl.tensor,
    entropy: tl.tensor,
    target: tl.tensor,
    grad_logp: tl.tensor,
    grad_entropy: tl.tensor,
    result: tl.tensor,
    result_stride: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write g_logp (onehot - p) - g_entropy p (log p + entropy), laid out as in `_residual`."""
    pieces = tl.cdiv(size, block)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = (tl.program_id(0) % pieces) * block + tl.arange(0, block)
    inside = columns < size
    x = tl.load(logits + row * row_stride + columns, mask=inside).to(tl.float32)
    hit = columns == tl.load(target + row)
    log_p = x * scale - tl.load(normaliser + row)
    p = tl.exp2(log_p * 1.4426950408889634)
    of_logp = tl.where(hit, 1 - p, -p) * tl.load(grad_logp + row)
    surprise = tl.maximum(log_p, -1e38) + tl.load(entropy + row)  # finite, so that p = 0 adds nothing
    slope = of_logp - p * surprise * tl.load(grad_entropy + row)
    tl.store(result + row * result_stride + columns, slope.to(result.dtype.element_ty), mask=inside)


INTERPRETED = triton is not None and not isinstance(_slope, triton.JITFunction)
"""True where the kernels run in triton's interpreter, which also works on the CPU."""


def supported(device: torch.device | str) -> bool:
    """Return whether the kernels run on `device`: a CUDA GPU that triton compiles for, with triton installed.

    Example:
        >>> supported("meta")
        False
    """
    device = torch.device(device)
    if triton is None:
        return False
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return INTERPRETED and device.type == "cpu"


def statistics(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return logp [R] and entropy [R] of each row, float32, nats, in one pass over the logits.

    All sums are in float32. A logit of -inf has p = 0 and adds nothing; a NaN makes its row's results NaN.

    Args:
        logits: [R, V] float32, bfloat16 or float16, contiguous within a row. Where the stride between rows is a
            multiple of 16 logits, loads are vectors of 16 bytes, else single logits.
        target: [R] int64 in [0, V). A target outside returns a logp of NaN; an error would need a device sync.
        scale: > 0; 1 / temperature.

    Raises:
        InputError: no triton, no CUDA device, or arguments that do not fit the above.
    """
    logp, entropy, _ = _normalise(logits, target, scale)
    return logp, entropy


def residual(logits: Tensor, target: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return p - onehot(target) [R, V] in `dtype`, subtracted before it is rounded, with logp [R] and entropy [R].

    Args:
        logits, target, scale: as for `statistics`.
        dtype: float32, bfloat16 or float16; where `logits` has it too, the result overwrites `logits`.

    Raises:
        InputError: as `statistics`.
    """
    result = _result(logits, dtype)
    logp, entropy, normaliser = _normalise(logits, target, scale)
    _launch(_residual, logits, (normaliser, target), result, scale)
    return result, logp, entropy


def slope(
    logits: Tensor, target: Tensor, scale: float, grad_logp: Tensor, grad_entropy: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return grad_logp (onehot - p) - grad_entropy p (log p + entropy), [R, V] in `dtype`.

    Args:
        logits, target, scale, dtype: as for `residual`.
        grad_logp, grad_entropy: [R] float32; d loss / d logp and d loss / d entropy.

    Raises:
        InputError: as `statistics`.
    """
    _check(logits, scale, grad_logp=grad_logp, grad_entropy=grad_entropy)
    result = _result(logits, dtype)
    _, entropy, normaliser = _normalise(logits, target, scale)
    _launch(_slope, logits, (normaliser, entropy, target, grad_logp, grad_entropy), result, scale)
    return result


def _normalise(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logp, entropy and logsumexp(logits * scale), each [R]."""
    _check(logits, scale, target=target)
    rows, size = logits.shape
    logp, entropy, normaliser = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    with torch.cuda.device_of(logits):
        _statistics[(rows,)](
            logits,
            logits.stride(0),
            target.contiguous(),
            logp,
            entropy,
            normaliser,
            size,
            float(scale),
            lanes=LANES,
            width=VECTOR_BYTES // logits.element_size(),
            num_warps=WARPS,
        )
    return logp, entropy, normaliser


def _launch(kernel: Any, logits: Tensor, rowwise: tuple[Tensor, ...], result: Tensor, scale: float) -> None:
    """Run `kernel`, which writes `result` from the logits and the columns with one value per row."""
    rows, size = logits.shape
    with torch.cuda.device_of(logits):
        kernel[(rows * triton.cdiv(size, BLOCK),)](
            logits,
            logits.stride(0),
            *(value.contiguous() for value in rowwise),
            result,
            result.stride(0),
            size,
            float(scale),
            block=BLOCK,
            num_warps=WARPS,
        )


def _result(logits: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in DTYPES:
        raise InputError(f"triton: result {dtype}: must be float32, bfloat16 or float16")
    return logits if logits.dtype == dtype else torch.empty(logits.shape, dtype=dtype, device=logits.device)


def _check(logits: Tensor, scale: float, **rowwise: Tensor) -> None:
    if triton is None:
        raise InputError("triton: needs the package `triton`, which is not installed")
    if not supported(logits.device):
        raise InputError(f"triton: needs a CUDA device; the logits are on {str(logits.device)!r}")
    if logits.ndim != 2 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise InputError(f"triton: logits {list(logits.shape)}: must be [R, V], each row's logits neighbours in memory")
    if logits.dtype not in DTYPES:
        raise InputError(f"triton: logits {logits.dtype}: must be float32, bfloat16 or float16")
    if not scale > 0:
        raise InputError(f"triton: scale={scale}: must be > 0")
    for name, value in rowwise.items():
        wanted = torch.int64 if name == "target" else torch.float32
        if value.shape != logits.shape[:1] or value.dtype != wanted or value.device != logits.device:
            raise InputError(
                f"triton: {name} {list(value.shape)} {value.dtype} on {value.device}: "
                f"must be [{len(logits)}] {wanted} on {logits.device}"
            )
