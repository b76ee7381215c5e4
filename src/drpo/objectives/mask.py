"""Trust regions that mask tokens by a divergence or ratio between mu and pi: DPPO; and, whatever the advantage, IPO,
IcePop and KPop."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require, require_one_of
from drpo.objectives.closed_form import masked_surrogate, token_loss
from drpo.objectives.divergence import TOPK
from drpo.objectives.ratios import prob_diff, ratio, wide
from drpo.types import TokenLoss, Tokens

BINARY = ("tv", "kl")
"""Divergences over two outcomes: the sampled token and all others."""


def binary_kl(tokens: Tokens) -> Tensor:
    """Return KL(Bernoulli(mu) || Bernoulli(pi)), [T], >= 0, in float32 or wider; infinite where pi = 1 > mu.

        mu (m - l) + (1 - mu) log((1 - mu) / (1 - pi))

    Both terms are computed from log-probabilities, which is accurate for probabilities near 0 and near 1. They cancel
    where pi is near mu; the error is then about one rounding of each, far below any threshold.

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
    return bernoulli_kl(behavior_logp, logp)


def bernoulli_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(Bernoulli(p) || Bernoulli(q)), [T], >= 0."""
    chosen = log_p.exp() * (log_p - log_q)
    rest = -torch.expm1(log_p) * (_log1mexp(log_p) - _log1mexp(log_q))
    # With p = 1 there is no rest: its term is 0, not 0 * inf.
    return (chosen + torch.where(log_p < 0, rest, 0)).clamp(min=0)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0."""
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _binary(divergence: str, tokens: Tokens) -> Tensor:
    """Return one of the divergences `BINARY`, [T]."""
    return prob_diff(tokens).abs() if divergence == "tv" else binary_kl(tokens)


@dataclass(frozen=True)
class DPPO:
    """Divergence PPO: masks a token that has left the region in the direction of its advantage.

        loss = -A sg(min(r, c) M) l     w = M min(r, c) / r

        M = 1 iff d <= delta_high or pi <= mu (A > 0);  d <= delta_low or pi >= mu (A <= 0)

        tv: d = |pi - mu|                        topk_tv: `divergence.topk_tv` at the position
        kl: d = KL(Bern(mu) || Bern(pi))         topk_kl: `divergence.topk_kl`

    A top-K divergence gives the distance of the distributions, the sampled token the direction. It is read from
    `Tokens.divergence`, which the trainer computes from the sampler's top log-probabilities.

    Args:
        delta_low: region for falling probabilities, > 0; a probability for "tv" and "topk_tv" (authors: 0.15), nats
            for "kl" and "topk_kl" (0.05).
        delta_high: region for rising ones; None means `delta_low`.
        divergence: "tv", "kl", "topk_tv" or "topk_kl".
        max_ratio: c, > 0; the weight's truncation.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range; on a call, a top-K divergence that the tokens do not carry.

    Example:
        >>> DPPO(0.15)
        DPPO(delta_low=0.15, delta_high=0.15, divergence='tv', max_ratio=20.0)
        >>> DPPO(0.05, divergence="topk_kl").needs
        frozenset({'topk_kl'})

    Source: Rethinking the Trust Region in LLM Reinforcement Learning, arXiv 2602.04879.
    """

    delta_low: float = 0.15
    delta_high: float | None = None
    divergence: str = "tv"
    max_ratio: float = 20.0
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require("delta_low", self.delta_low, above=0)
        if self.delta_high is None:
            object.__setattr__(self, "delta_high", self.delta_low)
        require("delta_high", self._high, above=0)
        require_one_of("divergence", self.divergence, (*BINARY, *TOPK))
        require("max_ratio", self.max_ratio, above=0)

    @property
    def needs(self) -> frozenset[str]:
        """The top-K divergence that it reads, or empty."""
        return frozenset({self.divergence}).intersection(TOPK)

    @property
    def _high(self) -> float:
        return self.delta_low if self.delta_high is None else self.delta_high

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, behavior_logp, advantage = wide(tokens)
        divergence = self._divergence(tokens)
        rising = (divergence <= self._high) | (logp <= behavior_logp)
        falling = (divergence <= self.delta_low) | (logp >= behavior_logp)
        keep = torch.where(advantage > 0, rising, falling)
        scale = ratio(tokens).clamp(max=self.max_ratio) * keep
        return token_loss(tokens, value=-advantage * scale * logp, slope=-advantage * scale)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: d > delta_high where pi > mu, d > delta_low elsewhere."""
        logp, behavior_logp, _ = wide(tokens)
        divergence = self._divergence(tokens)
        return torch.where(logp > behavior_logp, divergence > self._high, divergence > self.delta_low)

    def _divergence(self, tokens: Tokens) -> Tensor:
        """Return the divergence of pi from mu, [T], >= 0."""
        if self.divergence in BINARY:
            return _binary(self.divergence, tokens)
        if tokens.divergence is None:
            raise InputError(
                f"objective dppo with divergence={self.divergence!r}: tokens.divergence is missing; sample with "
                "sampling.top_logprobs > 0 and give the loss the sampler's `top_logprobs`, or fill it"
            )
        return tokens.divergence


@dataclass(frozen=True)
class SymmetricMask:
    """Masks every token outside the region, for any advantage (the IcePop and IPO family).

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
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)
        require_one_of("divergence", self.divergence, BINARY)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        kept = -advantage * ratio(tokens) * (_binary(self.divergence, tokens) <= self.delta)
        return token_loss(tokens, value=kept, slope=kept)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: the divergence > delta."""
        return _binary(self.divergence, tokens) > self.delta


@dataclass(frozen=True)
class IPO:
    """prime-rl's default since September 2026: a mask that ignores the advantage, and a capped ratio.

        loss = -A min(r, c) where |pi - mu| <= delta, else 0     w = min(r, c) / r or 0

    The cap bounds the value and keeps the direction. The mask also drops tokens that move back. It is `mask(delta)`
    with a cap.

    Args:
        delta: > 0, in units of probability.
        max_ratio: c, > 0.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> IPO()
        IPO(delta=0.3, max_ratio=10000.0)

    Source: prime-rl, `trainer/rl/loss.py`, pull requests 3418 and 3586. (Identity Preference Optimization is also
    called IPO; this is another method.)
    """

    delta: float = 0.3
    max_ratio: float = 1e4
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)
        require("max_ratio", self.max_ratio, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return masked_surrogate(tokens, ~self.out_of_region(tokens), most=self.max_ratio)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: |pi - mu| > delta."""
        return prob_diff(tokens).abs() > self.delta


@dataclass(frozen=True)
class IcePop:
    """Masks every token whose ratio is outside a band, whatever the advantage.

        loss = -r A where low <= r <= high, else 0     w = 1 or 0

    The ratio is the current policy's to the sampler's, so the mask moves with every update. Programs that compute the
    log-probabilities anew mask the ratio of those instead. On another objective the same mask is `band(low, high)`.

    Args:
        low: >= 0; 0 means no lower bound.
        high: > low.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> IcePop()
        IcePop(low=0.5, high=5.0)

    Source: arXiv 2510.18855 (0.5, 5); prime-rl's IcePopLoss has (0.2, 5).
    """

    low: float = 0.5
    high: float = 5.0
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("low", self.low, above=0, closed=True)
        require("high", self.high, above=self.low)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return masked_surrogate(tokens, ~self.out_of_region(tokens))

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: r < low or r > high."""
        r = ratio(tokens)
        return (r < self.low) | (r > self.high)


@dataclass(frozen=True)
class KPop:
    """Masks every token with a large Binary KL in either direction, whatever the advantage.

        loss = -r A where max(KL(Bern(pi) || Bern(mu)), KL(Bern(mu) || Bern(pi))) <= delta, else 0     w = 1 or 0

    Neither direction implies the other.

    Args:
        delta: > 0, nats.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: `delta` is not a positive number.

    Example:
        >>> KPop()
        KPop(delta=0.1)

    Source: KPop, ringtech.notion.site/kpop; AReaL pull request 1405, whose example has 2.0; prime-rl pull request
    3283, 0.1.
    """

    delta: float = 0.1
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return masked_surrogate(tokens, ~self.out_of_region(tokens))

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: either divergence > delta."""
        logp, behavior_logp, _ = wide(tokens)
        return torch.maximum(bernoulli_kl(behavior_logp, logp), bernoulli_kl(logp, behavior_logp)) > self.delta
