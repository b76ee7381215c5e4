"""Row operations on logits between the head's matrix products, in PyTorch.

R rows, V tokens. With z = logits * scale and p = softmax(z):

    statistics   logp = log p[target],  entropy = -sum p log p
    residual     p - onehot(target), with the statistics; a token-wise loss's slope is a multiple of it
    slope        the slope of a loss that reads the entropy too

`exact` holds more precise logits of some tokens: their ids [R, n] and these logits [R, n].

Each function overwrites `logits` and computes in float32 or wider. `triton.py` has the same three functions, so the
loops of `chunked.py` are the same on every device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 8
"""Rows per block on a CPU: the intermediate results then stay in a core's cache."""

NEVER = -1000.0
"""Replaces log p = -inf in p log p; p is 0 in float64 at this value."""

Exact = tuple[Tensor, Tensor]
"""Token ids [R, n] int64, and their logits [R, n] in float32."""


def statistics(logits: Tensor, target: Tensor, scale: float, exact: Exact | None = None) -> tuple[Tensor, Tensor]:
    """Return logp [R] and entropy [R] of each row, nats.

    Args:
        logits: [R, V] float; overwritten.
        target: [R] int64 in [0, V).
        scale: 1 / temperature.
        exact: token ids and more precise logits of these, or None.
    """
    logp, entropy = _results(logits)
    for rows, z in _shifted(logits, scale, exact):
        p, normaliser = _softmax(z)
        logp[rows], entropy[rows] = _figures(z, p, normaliser, target[rows])
    return logp, entropy


def residual(
    logits: Tensor, target: Tensor, scale: float, dtype: torch.dtype, exact: Exact | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p - onehot(target) [R, V] in `dtype`, subtracted before it is rounded, with logp [R] and entropy [R].

    Args:
        logits, target, scale, exact: as for `statistics`.
        dtype: the result's; where `logits` has it too, the result overwrites `logits`.
    """
    logp, entropy = _results(logits)
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    for rows, z in _shifted(logits, scale, exact):
        p, normaliser = _softmax(z)
        logp[rows], entropy[rows] = _figures(z, p, normaliser, target[rows])
        out[rows] = p.scatter_add_(1, target[rows, None], p.new_full((len(p), 1), -1))
    return out, logp, entropy


def slope(
    logits: Tensor,
    target: Tensor,
    scale: float,
    grad_logp: Tensor,
    grad_entropy: Tensor,
    dtype: torch.dtype,
    exact: Exact | None = None,
) -> Tensor:
    """Return grad_logp (onehot - p) - grad_entropy p (log p + entropy), [R, V] in `dtype`.

    Args:
        logits, target, scale, dtype, exact: as for `residual`.
        grad_logp, grad_entropy: [R] float; d loss / d logp and d loss / d entropy.
    """
    out = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
    for rows, z in _shifted(logits, scale, exact):
        p, normaliser = _softmax(z)
        log_p = (z - normaliser[:, None]).clamp_(min=NEVER)
        _, entropy = _figures(z, p, normaliser, target[rows])
        log_p.add_(entropy[:, None]).mul_(grad_entropy[rows, None]).add_(grad_logp[rows, None]).mul_(p).neg_()
        out[rows] = log_p.scatter_add_(1, target[rows, None], grad_logp[rows, None])
    return out


def _results(logits: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    return logp, torch.empty_like(logp)


def _shifted(logits: Tensor, scale: float, exact: Exact | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows and their z minus each row's maximum, in place or in one scratch buffer."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    size = min(len(logits), ROWS if logits.device.type == "cpu" else len(logits))
    scratch = None if logits.dtype == wide else torch.empty_like(logits[:size], dtype=wide)
    for start in range(0, len(logits), max(1, size)):
        rows = slice(start, start + size)
        z = logits[rows]
        if scratch is not None:
            z = scratch[: len(z)].copy_(z)
        if exact is not None:
            z.scatter_(1, exact[0][rows], exact[1][rows])
        if scale != 1:
            z.mul_(scale)
        yield rows, z.sub_(z.amax(-1, keepdim=True))


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return p [R, V] and log sum e^z [R], for rows with a maximum of 0."""
    p = torch.softmax(z, dim=-1)
    return p, -p.amax(-1).log()


def _figures(z: Tensor, p: Tensor, normaliser: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return logp [R] and entropy [R], non-negative since both terms are. Overwrites z."""
    logp = z.gather(1, target[:, None])[:, 0] - normaliser
    return logp, normaliser - z.clamp_(min=NEVER).mul_(p).sum(-1)
