"""Trust regions that drop tokens by a divergence between mu and pi: DPPO, and the mask that ignores the advantage."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives._check import require, require_one_of
from drpo.objectives.contract import ratio, shift, token_loss, wide
from drpo.types import TokenLoss, Tokens


def binary_kl(tokens: Tokens) -> Tensor:
    """Return KL(Bernoulli(mu) || Bernoulli(pi)), [T], >= 0, in float32 or wider; infinite where pi = 1 > mu.

        mu (m - l) + (1 - mu) log((1 - mu) / (1 - pi))

    Both terms come from the log-probabilities, so that neither a tiny probability nor one next to 1 is rounded away.
    The terms cancel where pi is near mu: the error is then about one rounding of each, far below any threshold.

    Args:
        tokens: T tokens.

    Example:
        >>> from drpo.objectives.mask import binary_kl
        >>> pi, mu, one = torch.tensor([0.5]), torch.tensor([0.25]), torch.ones(1)
        >>> binary_kl(Tokens(pi.log(), mu.log(), one, one.bool(), one.long()))
        tensor([0.1308])

    Source: DPPO, arXiv 2602.04879 (Binary-KL).
    """
    logp, behavior_logp, _ = wide(tokens)
    chosen = behavior_logp.exp() * (behavior_logp - logp)
    rest = -torch.expm1(behavior_logp) * (_log1mexp(behavior_logp) - _log1mexp(logp))
    # mu = 1 leaves no rest: its term is 0, not 0 * inf.
    return (chosen + torch.where(behavior_logp < 0, rest, 0)).clamp(min=0)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0."""
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@dataclass(frozen=True)
class DPPO:
    """Divergence PPO: a token is dropped once it has left the region the way its advantage pushes it.

        loss = -A sg(min(r, c) M) l     w = M min(r, c) / r

        tv: M = 1 iff D <= delta_high (A > 0) or D >= -delta_low (A <= 0),  D = pi - mu
        kl: M = 1 iff KL(Bern(mu) || Bern(pi)) <= delta_high or pi <= mu (A > 0); <= delta_low or pi >= mu (A <= 0)

    Args:
        delta_low: region for falling probabilities, > 0; a probability for "tv" (authors: 0.15), nats for "kl" (0.05).
        delta_high: region for rising ones; None means `delta_low`.
        divergence: "tv" or "kl".
        max_ratio: c, > 0; the weight's truncation.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> DPPO(0.15)
        DPPO(delta_low=0.15, delta_high=0.15, divergence='tv', max_ratio=20.0)

    Source: Rethinking the Trust Region in LLM Reinforcement Learning, arXiv 2602.04879.
    """

    delta_low: float = 0.15
    delta_high: float | None = None
    divergence: str = "tv"
    max_ratio: float = 20.0
    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta_low", self.delta_low, above=0)
        if self.delta_high is None:
            object.__setattr__(self, "delta_high", self.delta_low)
        require("delta_high", self._high, above=0)
        _require_divergence(self.divergence)
        require("max_ratio", self.max_ratio, above=0)

    @property
    def _high(self) -> float:
        return self.delta_low if self.delta_high is None else self.delta_high

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, behavior_logp, advantage = wide(tokens)
        if self.divergence == "tv":
            moved = shift(tokens)
            keep = torch.where(advantage > 0, moved <= self._high, moved >= -self.delta_low)
        else:
            moved = binary_kl(tokens)
            rising = (moved <= self._high) | (logp <= behavior_logp)
            falling = (moved <= self.delta_low) | (logp >= behavior_logp)
            keep = torch.where(advantage > 0, rising, falling)
        scale = ratio(tokens).clamp(max=self.max_ratio) * keep
        return token_loss(tokens, value=-advantage * scale * logp, slope=-advantage * scale)


@dataclass(frozen=True)
class SymmetricMask:
    """Drop every token outside the region, whatever its advantage (the IcePop and IPO family).

        loss = -r A where the divergence <= delta, else 0     w = 1 or 0

    Args:
        delta: > 0; a probability for "tv", nats for "kl".
        divergence: "tv", |pi - mu|, or "kl", KL(Bern(mu) || Bern(pi)).

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> SymmetricMask(0.1)
        SymmetricMask(delta=0.1, divergence='tv')

    Source: prime-rl's IPO loss; IcePop masks likewise on the ratio.
    """

    delta: float
    divergence: str = "tv"
    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)
        _require_divergence(self.divergence)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        moved = shift(tokens).abs() if self.divergence == "tv" else binary_kl(tokens)
        kept = -advantage * ratio(tokens) * (moved <= self.delta)
        return token_loss(tokens, value=kept, slope=kept)


def _require_divergence(name: str) -> None:
    require_one_of("divergence", name, ("tv", "kl"))
