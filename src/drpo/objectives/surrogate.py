"""Importance-weighted surrogates: plain, truncated (TIS), CISPO."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives._check import require
from drpo.objectives.closed_form import token_loss
from drpo.objectives.ratios import ratio, wide
from drpo.types import TokenLoss, Tokens


@dataclass(frozen=True)
class ImportanceSampling:
    """The unregularised off-policy policy gradient; with a cap, truncated importance sampling.

        loss = -r A                   w = 1
        loss = -A sg(min(r, c)) l     w = min(r, c) / r      with max_ratio = c

    Args:
        max_ratio: c, > 0, or None for no truncation.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: `max_ratio` is not a positive number.

    Example:
        >>> ImportanceSampling(2.0)
        ImportanceSampling(max_ratio=2.0)

    Source: the DRPO paper's unregularised baseline, arXiv 2606.09821; truncation: Ionides 2008.
    """

    max_ratio: float | None = None
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.max_ratio is not None:
            require("max_ratio", self.max_ratio, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, _, advantage = wide(tokens)
        r = ratio(tokens)
        if self.max_ratio is None:
            return token_loss(tokens, value=-r * advantage, slope=-advantage * r)
        truncated = r.clamp(max=self.max_ratio)
        return token_loss(tokens, value=-advantage * truncated * logp, slope=-advantage * truncated)


@dataclass(frozen=True)
class CISPO:
    """Clipped importance-sampling weights: the weight is clipped, no token's gradient is masked.

        loss = -A sg(clip(r, 1 - low, 1 + high)) l     w = clip(r, 1 - low, 1 + high) / r

    Args:
        low: in [0, 1]; 1 means no lower clip.
        high: >= 0.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> CISPO(0.2, 0.28)
        CISPO(low=0.2, high=0.28)

    Source: MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5.
    """

    low: float = 0.2
    high: float = 0.28
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("low", self.low, above=0, below=1, closed=True)
        require("high", self.high, above=0, closed=True)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, _, advantage = wide(tokens)
        clipped = ratio(tokens).clamp(1 - self.low, 1 + self.high)
        return token_loss(tokens, value=-advantage * clipped * logp, slope=-advantage * clipped)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: r < 1 - low or r > 1 + high, where the weight is clipped."""
        r = ratio(tokens)
        return (r < 1 - self.low) | (r > 1 + self.high)


@dataclass(frozen=True)
class SAPO:
    """A soft gate on the ratio instead of a clip, with a temperature per sign of the advantage.

        loss = -A (4 / tau) sigmoid(tau (r - 1))     w = 4 s (1 - s),  s = sigmoid(tau (r - 1))

    tau is `tau_positive` where A > 0, else `tau_negative`.

    Args:
        tau_positive: > 0.
        tau_negative: > 0.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a temperature that is not positive.

    Example:
        >>> SAPO()
        SAPO(tau_positive=1.0, tau_negative=1.05)

    Source: Soft Adaptive Policy Optimization, arXiv 2511.20347.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("tau_positive", self.tau_positive, above=0)
        require("tau_negative", self.tau_negative, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        r = ratio(tokens)
        tau = torch.where(advantage > 0, r.new_tensor(self.tau_positive), r.new_tensor(self.tau_negative))
        gate = torch.sigmoid(tau * (r - 1))
        # 1 - sigmoid(x) would round to 0 for large ratios; sigmoid(-x) does not.
        weight = 4 * gate * torch.sigmoid(-tau * (r - 1))
        return token_loss(tokens, value=-advantage * 4 / tau * gate, slope=-advantage * r * weight)
