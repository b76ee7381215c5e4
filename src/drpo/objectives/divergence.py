"""Divergences of the policy from the sampler at a token, over the sampler's K most probable tokens.

Shapes: T tokens, K most probable tokens at each, vocabulary size V. p is the sampler's distribution mu, q the policy's
pi. The remaining probability is one more outcome, the rest, so both are distributions over K + 1 outcomes. Merging
outcomes never increases a divergence: these are lower bounds of those over the whole vocabulary, exact at K = V.

The K are the sampler's most probable tokens and no others: a sampled token outside counts in the rest, and ties at the
edge are broken arbitrarily. The golden vectors of the method's authors follow this reading (tests/golden/topk.json).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from drpo.errors import InputError, nearest

DEFAULT_K = 20
"""The K that the method's authors use."""


def topk_tv(logp: Tensor, behavior_logp: Tensor) -> Tensor:
    """Return the total variation between sampler and policy over K tokens and the rest.

        (sum_k |p_k - q_k| + |rest_p - rest_q|) / 2

    Args:
        logp: [..., K] nats, <= 0; log q of the sampler's K most probable tokens; -inf is a probability of 0.
        behavior_logp: [..., K] nats, <= 0; log p of the same tokens.

    Returns:
        [...] in [0, 1], float32 or wider.

    Example:
        >>> q, p = torch.tensor([[0.2, 0.5]]), torch.tensor([[0.6, 0.3]])
        >>> topk_tv(q.log(), p.log())
        tensor([0.4000])

    Source: DPPO, arXiv 2602.04879 (Top-K TV).
    """
    dtype, _ = _precision(logp, behavior_logp)
    log_q, log_p = logp.double(), behavior_logp.double()
    listed = (log_p.exp() - log_q.exp()).abs().sum(-1)
    return ((listed + (_rest(log_p) - _rest(log_q)).abs()) / 2).clamp(max=1).to(dtype)


def topk_kl(logp: Tensor, behavior_logp: Tensor) -> Tensor:
    """Return KL(sampler || policy) over K tokens and the rest.

        sum_k p_k log(p_k / q_k) + rest_p log(rest_p / rest_q)

    A rest is at least the inputs' rounding (1.2e-7 in float32); below it the remainder of 1 is noise, and so is its
    logarithm.

    Args:
        logp: [..., K] nats, <= 0; log q of the sampler's K most probable tokens; -inf is a probability of 0.
        behavior_logp: [..., K] nats, <= 0; log p of the same tokens.

    Returns:
        [...] nats, >= 0, float32 or wider; infinite where q = 0 at a token with p > 0.

    Example:
        >>> q, p = torch.tensor([[0.2, 0.5]]), torch.tensor([[0.6, 0.3]])
        >>> topk_kl(q.log(), p.log())
        tensor([0.3961])

    Source: DPPO, arXiv 2602.04879 (Top-K KL).
    """
    dtype, noise = _precision(logp, behavior_logp)
    log_q, log_p = logp.double(), behavior_logp.double()
    rest_q, rest_p = (_rest(x).clamp(min=noise).log()[..., None] for x in (log_q, log_p))
    return (_excess(log_p, log_q) + _excess(rest_p, rest_q)).clamp(min=0).to(dtype)


def _excess(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over K of p log(p / q) - p + q, each term >= 0; [..., K] -> [...].

    Over all outcomes, - p + q sums to 0. Per term it cancels, to first order, the error that a common error of all q
    adds to p log(p / q).
    """
    p, q = log_p.exp(), log_q.exp()
    return (torch.where(p > 0, p * (log_p - log_q), 0) - p + q).sum(-1)


def _rest(logp: Tensor) -> Tensor:
    """Return 1 - the sum of the K probabilities, >= 0; [..., K] -> [...].

    The largest probability is subtracted first, by expm1 of its logarithm, which is accurate near 1.
    """
    top, at = logp.max(-1, keepdim=True)
    others = logp.scatter(-1, at, -torch.inf).exp().sum(-1)
    return (-torch.expm1(top[..., 0]) - others).clamp(min=0)


def _precision(*inputs: Tensor) -> tuple[torch.dtype, float]:
    """Return the result's dtype and the inputs' coarsest relative rounding; computations between are in float64."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype, max(torch.finfo(x.dtype).eps for x in inputs)


TOPK: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"topk_tv": topk_tv, "topk_kl": topk_kl}
"""The divergences that an objective's `needs` may name: (logp, behavior_logp) [T, K] -> [T]."""


COLUMNS = ("position", "batch", "proximal_logp", "score", "reference_logp")
"""What else `needs` may name: see `contract.Objective`."""


def needed_divergence(needs: Iterable[str]) -> str | None:
    """Return the divergence that an objective's `needs` names, or None.

    Raises:
        InputError: an unknown name, or more than one.

    Example:
        >>> needed_divergence(frozenset({"topk_tv"})), needed_divergence(frozenset())
        ('topk_tv', None)
    """
    names = sorted(set(needs).difference(COLUMNS))
    for name in names:
        if name not in TOPK:
            raise InputError(f"objective.needs={name!r}{nearest(name, (*TOPK, *COLUMNS))}")
    if len(names) > 1:
        raise InputError(f"objective.needs={names}: there is one Tokens.divergence; name one of {', '.join(TOPK)}")
    return names[0] if names else None
