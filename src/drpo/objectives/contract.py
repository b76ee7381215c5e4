"""What an objective is, and the four questions that can be asked of any one of them."""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from drpo.types import TokenLoss, Tokens

MAX_LOG_RATIO = 20.0
"""Ratios are e^min(logp - behavior_logp, 20); tokens beyond are counted by the trainer as capped."""


@runtime_checkable
class Objective(Protocol):
    """A loss per token. Any callable of this shape is one; there is nothing to register.

    Attributes:
        tokenwise: False where a token's loss depends on the rest of its sequence (GSPO).
        needs: the name, from `divergence.TOPK`, of what `Tokens.divergence` must hold; empty where it is not read.
    """

    @property
    def tokenwise(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, tokens: Tokens) -> TokenLoss: ...


def masked_safe(tokens: Tokens) -> Tokens:
    """Replace what stands in slots that are not kept by harmless numbers, *before* anything is exponentiated.

    A `where` after the exponential would leave a finite loss with a NaN gradient (inf * 0).
    """

    def clean(values: Tensor) -> Tensor:
        return torch.where(tokens.keep, values, torch.zeros_like(values))

    return replace(
        tokens,
        logp=clean(tokens.logp),
        behavior_logp=clean(tokens.behavior_logp),
        advantage=clean(tokens.advantage),
        divergence=None if tokens.divergence is None else clean(tokens.divergence),
    )


def total(objective: Objective, tokens: Tokens, weight: Tensor) -> Tensor:
    """Return the batch's loss, or a part's share of it: sum over kept tokens of weight * loss.

    The weights are fixed over the whole optimiser batch (`drpo.reductions`), so the shares of any split add up to the
    same loss and the same gradient, and a masked token is a removed token, to the bit.

    Args:
        objective: any objective.
        tokens: T tokens; `logp` carries the gradient.
        weight: [T] float; what each token counts.

    Returns:
        A scalar, differentiable in `tokens.logp`; exactly 0, and still differentiable, where nothing is kept.

    Example:
        >>> from drpo.objectives import DRPO
        >>> keep, sequence = torch.tensor([True, False]), torch.tensor([0, 0])
        >>> t = Tokens(torch.zeros(2), torch.zeros(2), torch.ones(2), keep, sequence)
        >>> total(DRPO(0.2), t, torch.ones(2))
        tensor(-1.)
    """
    loss = objective(masked_safe(tokens)).loss
    return (weight * loss)[tokens.keep].sum()


def gradient(objective: Objective, tokens: Tokens) -> Tensor:
    """Return d(sum of the kept tokens' losses) / d logp.

    Args:
        objective: any objective.
        tokens: T tokens, of any floating dtype.

    Returns:
        [T], detached, in the dtype of `tokens.logp`; 0 where a token is not kept.

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> gradient(DRPO(0.2), Tokens(-one, -one, one, one.bool(), one.long()))  # on-policy: REINFORCE
        tensor([-1.])
    """
    return value_and_gradient(objective, tokens)[1]


def value_and_gradient(objective: Objective, tokens: Tokens) -> tuple[TokenLoss, Tensor]:
    """Return what the objective says of each token, detached, and `gradient(objective, tokens)`, asking it once.

    Args:
        objective: any objective.
        tokens: T tokens, of any floating dtype.

    Returns:
        TokenLoss with loss [T] (meaningless where a token is not kept), and the gradient [T].

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> seen, slope = value_and_gradient(DRPO(0.2), Tokens(-one, -one, one, one.bool(), one.long()))
        >>> seen.loss, slope
        (tensor([-1.]), tensor([-1.]))
    """
    with torch.enable_grad():
        logp = tokens.logp.detach().requires_grad_()
        seen = objective(masked_safe(replace(tokens, logp=logp)))
        (slope,) = torch.autograd.grad(seen.loss[tokens.keep].sum(), logp, allow_unused=True)
    detached = TokenLoss(seen.loss.detach(), seen.metrics)
    return detached, torch.zeros_like(logp) if slope is None else slope


def gradient_weight(objective: Objective, tokens: Tokens) -> Tensor:
    """Return the factor w by which an objective changes the plain policy gradient of each token.

        d loss / d logp = -A * r * w,   r = pi / mu

    Args:
        objective: any objective.
        tokens: T tokens.

    Returns:
        [T], detached; 1 where A is 0 or the token is not kept (and where r underflows to 0: w is undefined there).

    Example:
        >>> from drpo.objectives import DRPO
        >>> pi, mu, yes = torch.tensor([0.5]), torch.tensor([0.4]), torch.tensor([True])
        >>> gradient_weight(DRPO(0.2), Tokens(pi.log(), mu.log(), torch.ones(1), yes, torch.zeros(1).long()))
        tensor([0.5000])

    Source: DRPO, arXiv 2606.09821, Table 1.
    """
    safe = masked_safe(tokens)
    plain = (-safe.advantage * ratio(safe)).detach()
    defined = tokens.keep & (plain != 0)
    return torch.where(defined, gradient(objective, tokens) / torch.where(defined, plain, 1), 1)


def vanishes_at_zero_advantage(objective: Objective) -> bool:
    """True where a token with A = 0 has no gradient, so that the trainer may skip it without changing anything.

    Found by asking the objective over a grid of probabilities, so it holds for a user's own objective too.

    Example:
        >>> from drpo.objectives import DRPO
        >>> vanishes_at_zero_advantage(DRPO(0.2)), vanishes_at_zero_advantage(DRPO(0.2, advantage_weighted=False))
        (True, False)
    """
    grid = torch.linspace(-12.0, -0.01, 25)
    logp, behavior_logp = (g.reshape(-1) for g in torch.meshgrid(grid, grid, indexing="ij"))
    n = logp.numel()
    probe = Tokens(
        logp,
        behavior_logp,
        advantage=torch.zeros(n),
        keep=torch.ones(n, dtype=torch.bool),
        sequence=torch.arange(n) // 5,
        divergence=torch.linspace(0, 1, n) if objective.needs else None,
    )
    return not bool(gradient(objective, probe).any())


# What objectives are made of. Probabilities, ratios and shifts are computed in float32 or wider, whatever comes in.


def wide(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """`logp`, `behavior_logp`, `advantage`, each in float32, or float64 where it came so."""

    def widen(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else values.float()

    return widen(tokens.logp), widen(tokens.behavior_logp), widen(tokens.advantage)


def ratio(tokens: Tokens) -> Tensor:
    """Return r = pi / mu = e^min(logp - behavior_logp, 20), [T]; never infinite."""
    logp, behavior_logp, _ = wide(tokens)
    return torch.exp((logp - behavior_logp).clamp(max=MAX_LOG_RATIO))


def shift(tokens: Tokens, power: float = 0.0) -> Tensor:
    """Return D / mu^power, D = pi - mu, [T], without cancellation where pi is near mu and without overflow anywhere.

        D / mu^q = sign(l - m) * e^(max(l, m) - q m) * (1 - e^-|l - m|)

    At q = 0 it is exact and in [-1, 1]; at q = 1 it is r - 1. The exponent is capped at 20, as the ratio's is.
    """
    logp, behavior_logp, _ = wide(tokens)
    log_ratio = logp - behavior_logp
    scale = torch.exp((torch.maximum(logp, behavior_logp) - power * behavior_logp).clamp(max=MAX_LOG_RATIO))
    return -log_ratio.sign() * scale * torch.expm1(-log_ratio.abs())


def token_loss(tokens: Tokens, value: Tensor, slope: Tensor) -> TokenLoss:
    """Return the loss with this value and this derivative with respect to `tokens.logp`, both [T] constants.

    Objectives state their derivative in closed form because that is what they are known by; it also keeps it exact
    where the value's own automatic derivative would be inf * 0 (capped ratios, vanishing probabilities).
    """
    logp = tokens.logp
    return TokenLoss(value.detach() + slope.detach() * (logp - logp.detach()))
