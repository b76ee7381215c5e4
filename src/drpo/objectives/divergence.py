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
"""The K of the method's authors."""


def topk_tv(logp: Tensor, behavior_logp: Tensor) -> Tensor:
    """Return the total variation between sampler and policy over K tokens and the rest.

        (sum_k |p_k - q_k| + |rest_p - rest_q|) / 2

    Args:
        logp: [..., K] nats, <= 0; log q of the sampler's K most probable tokens; -inf is a probability of 0.
        behavior_logp: [..., K] nats, <= 0; log p of the same.

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

    A rest smaller than the inputs' rounding (1.2e-7 in float32) counts as that large: below it, what is left of 1 is
    noise, and its logarithm would be noise of any size.

    Args:
        logp: [..., K] nats, <= 0; log q of the sampler's K most probable tokens; -inf is a probability of 0.
        behavior_logp: [..., K] nats, <= 0; log p of the same.

    Returns:
        [...] nats, >= 0, float32 or wider; infinite where the policy has ruled out a token that the sampler may draw.

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
    """[..., K] -> [...]: sum of p log(p / q) - p + q, each term >= 0.

    Over all outcomes - p + q adds up to 0. Term by term it takes away what a common error of all q would add to a plain
    sum of p log(p / q), to first order.
    """
    p, q = log_p.exp(), log_q.exp()
    return (torch.where(p > 0, p * (log_p - log_q), 0) - p + q).sum(-1)


def _rest(logp: Tensor) -> Tensor:
    """[..., K] -> [...]: 1 - the sum of the probabilities, >= 0.

    The largest probability is taken from 1 by itself, in its logarithm, so that one next to 1 leaves its digits.
    """
    top, at = logp.max(-1, keepdim=True)
    others = logp.scatter(-1, at, -torch.inf).exp().sum(-1)
    return (-torch.expm1(top[..., 0]) - others).clamp(min=0)


def _precision(*inputs: Tensor) -> tuple[torch.dtype, float]:
    """The result's dtype, and the coarsest rounding of the inputs, as part of 1.

    What is between them is done in float64: the rest is what is left of 1.
    """
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype, max(torch.finfo(x.dtype).eps for x in inputs)


TOPK: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"topk_tv": topk_tv, "topk_kl": topk_kl}
"""Every divergence that an objective's `needs` may name: (logp, behavior_logp) [T, K] -> [T]."""


def needed_divergence(needs: Iterable[str]) -> str | None:
    """Return the name of the divergence that an objective's `needs` asks for in `Tokens.divergence`, or None.

    Raises:
        InputError: a name that nothing computes, or more than one.

    Example:
        >>> needed_divergence(frozenset({"topk_tv"})), needed_divergence(frozenset())
        ('topk_tv', None)
    """
    names = sorted(needs)
    for name in names:
        if name not in TOPK:
            raise InputError(f"objective.needs={name!r}{nearest(name, TOPK)}")
    if len(names) > 1:
        raise InputError(f"objective.needs={names}: there is one Tokens.divergence; name one of {', '.join(TOPK)}")
    return names[0] if names else None
