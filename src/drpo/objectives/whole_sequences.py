"""Objectives of a sequence's ratio, besides GSPO: VESPO's soft weight and GMPO's clipped geometric mean."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives._check import require
from drpo.objectives.closed_form import token_loss
from drpo.objectives.contract import around_proximal
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, wide
from drpo.objectives.sequences import Sequences
from drpo.types import TokenLoss, Tokens

LOWEST_LOG_RATIO = math.log(1e-8)
"""VESPO's log-ratio of a sequence is clamped below at this."""


@dataclass(frozen=True)
class VESPO:
    """A soft weight on the product of a sequence's ratios, which vanishes at both ends.

        loss = -A sg(phi) l     w = phi / r
        phi  = e^lambda W^k e^(-lambda W),   W = prod_i r, its logarithm clamped to [log 1e-8, 20]

    The peak is at W = k / lambda: below 1 for A >= 0, above 1 for A < 0. W is the product, not the geometric mean, so
    phi underflows for long sequences, or for those far from the sampler.

    With `max_ratio` the ratio is of three policies, p = proximal_logp in the middle:

        W = prod_i e^(l - p) min(e^(p - m), max_ratio)

    The sampler's part is then truncated token by token, the updates' is not. It takes a forward pass more per rollout.

    Args:
        k_positive: k where A >= 0; > 0.
        lambda_positive: lambda there; > 0.
        k_negative: k where A < 0; > 0.
        lambda_negative: lambda there; > 0.
        max_ratio: > 0, or None for the ratio to the sampler itself.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter that is not positive; on a call, with `max_ratio`, `tokens.proximal_logp` is missing.

    Example:
        >>> VESPO()
        VESPO(k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0, max_ratio=None)

    Source: arXiv 2602.10693; the authors' program and TRL's `vespo`, which have these defaults; `max_ratio`: TRL's with
    its `token_truncate`, 3.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    max_ratio: float | None = None
    tokenwise: ClassVar[bool] = False
    vanishes_at_zero_advantage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            require(name, getattr(self, name), above=0)
        if self.max_ratio is not None:
            require("max_ratio", self.max_ratio, above=0)

    @property
    def needs(self) -> frozenset[str]:
        """The proximal policy, with `max_ratio`."""
        return frozenset() if self.max_ratio is None else frozenset({"proximal_logp"})

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, _, advantage = wide(tokens)
        summed = Sequences.of(tokens).sum(self._log_ratio(tokens)).clamp(LOWEST_LOG_RATIO, MAX_LOG_RATIO)
        gained = advantage >= 0
        k = torch.where(gained, summed.new_tensor(self.k_positive), summed.new_tensor(self.k_negative))
        scale = torch.where(gained, summed.new_tensor(self.lambda_positive), summed.new_tensor(self.lambda_negative))
        phi = torch.exp(k * summed - scale * torch.expm1(summed))
        return token_loss(tokens, value=-advantage * phi * logp, slope=-advantage * phi)

    def _log_ratio(self, tokens: Tokens) -> Tensor:
        if self.max_ratio is None:
            return log_ratio(tokens)
        near, far = around_proximal(tokens)
        return log_ratio(near) + log_ratio(far).clamp(max=math.log(self.max_ratio))


@dataclass(frozen=True)
class GMPO:
    """The geometric mean of a sequence's ratios, each clipped by itself in the direction that its advantage pushes it.

        loss = -A s_i,   s_i = exp(mean over kept tokens of y)
        y    = min(l - m, high) if A > 0,   max(l - m, -low) if A < 0

    The gradient at each token is -A s_i where y = l - m, else 0. The bounds are of the log-ratio: 0.4 means ratios in
    [0.67, 1.49]. With `sequence_mean` the loss is the paper's, the mean over sequences of -A s_i. Without the clip it
    is GSPO without its clip.

    Args:
        low: >= 0, nats.
        high: >= 0, nats.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> GMPO()
        GMPO(low=0.4, high=0.4)

    Source: Geometric-Mean Policy Optimization, arXiv 2507.20673; verl's `geo_mean`.
    """

    low: float = 0.4
    high: float = 0.4
    tokenwise: ClassVar[bool] = False
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("low", self.low, above=0, closed=True)
        require("high", self.high, above=0, closed=True)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        gap = log_ratio(tokens)
        clipped = torch.where(advantage > 0, gap.clamp(max=self.high), gap.clamp(min=-self.low))
        s = Sequences.of(tokens).mean(clipped).clamp(max=MAX_LOG_RATIO).exp()
        value = -advantage * s
        return token_loss(tokens, value=value, slope=value * (clipped == gap))

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: the log-ratio is below -low or above high."""
        gap = log_ratio(tokens)
        return (gap < -self.low) | (gap > self.high)
