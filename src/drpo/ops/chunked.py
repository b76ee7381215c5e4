"""The head operator in chunks of tokens: [chunk, V] of logits at a time, made again in the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24
"""Logits held at once where the caller names no chunk: 64 MiB in float32."""


class _LinearLogprob(torch.autograd.Function):
    """d logits = (g_logp (onehot - p) - g_entropy p (log p + entropy)) / temperature, row by row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy, normaliser = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, temperature)
            normaliser[rows] = logits.logsumexp(-1)
            logp[rows] = logits.gather(-1, target[rows, None])[:, 0] - normaliser[rows]
            log_p = logits.sub_(normaliser[rows, None])
            p = log_p.exp()
            # A logit of -inf (a token ruled out) has p = 0 and adds nothing.
            entropy[rows] = -torch.where(p > 0, log_p, 0).mul_(p).sum(-1)
        ctx.save_for_backward(hidden, weight, target, normaliser, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp, entropy

    @staticmethod
    @once_differentiable  # the normalisers are saved as constants, so a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, normaliser, entropy = ctx.saved_tensors
        grad_logp, grad_entropy = grads
        wide = normaliser.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        with_entropy = bool(grad_entropy.any())
        for rows in _chunks(len(hidden), ctx.chunk):
            log_p = _logits(hidden[rows], weight, ctx.temperature).sub_(normaliser[rows, None])
            p = log_p.exp()
            slope = p * -grad_logp[rows, None]
            slope.scatter_add_(-1, target[rows, None], grad_logp[rows, None])
            if with_entropy:
                log_p = torch.where(p > 0, log_p, 0)
                slope.sub_(p.mul_(log_p.add_(entropy[rows, None])).mul_(grad_entropy[rows, None]))
            slope = slope.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, n, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """[C, V] in float32 or wider; the product itself runs in hidden's dtype."""
    logits = hidden @ weight.to(hidden.dtype).T
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `drpo.ops.linear_logprob`, with the number of tokens per chunk in the caller's hands."""
    size = chunk or max(1, CHUNK_ELEMENTS // len(weight))
    logp, entropy = _LinearLogprob.apply(hidden, weight, target, temperature, size)  # type: ignore[no-untyped-call]
    return logp, entropy
