"""Trust regions by clipping the ratio: PPO (token) and GSPO (sequence)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives._check import require
from drpo.objectives.closed_form import token_loss
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, ratio, wide
from drpo.objectives.sequences import Sequences
from drpo.types import TokenLoss, Tokens


def _inside(r: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Return [T] bool: True where the clip does not bind, on the side to which the advantage pushes the ratio."""
    return torch.where(advantage > 0, r <= 1 + high, r >= 1 - low)


def _outside(r: Tensor, low: float, high: float) -> Tensor:
    return (r < 1 - low) | (r > 1 + high)


@dataclass(frozen=True)
class PPOClip:
    """PPO's clipped surrogate, also of GRPO and DAPO; optionally with the dual clip, or with a capped ratio.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A);   with dual = c, where A < 0: -max(that min, c A)
        w = 0 where a clip binds, else 1
        with max_ratio: min(r, max_ratio) in place of r, and w = min(r, max_ratio) / r where no clip binds

    The dual clip silences a token of A < 0 whose ratio is large; the cap bounds it and keeps its direction.

    Args:
        low: in [0, 1]; 1 means no lower clip.
        high: >= 0; larger than `low` is DAPO's clip-higher.
        dual: c > 1, or None for no dual clip.
        max_ratio: > 0, or None for no cap.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> PPOClip(0.2, 0.28)
        PPOClip(low=0.2, high=0.28, dual=None, max_ratio=None)

    Source: PPO, arXiv 1707.06347, Eq. 7; dual clip: arXiv 1912.09729, Eq. 5; clip-higher: DAPO, arXiv 2503.14476; cap:
    prime-rl's PPOLoss, whose default is 1e4.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    max_ratio: float | None = None
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("low", self.low, above=0, below=1, closed=True)
        require("high", self.high, above=0, closed=True)
        if self.dual is not None:
            require("dual", self.dual, above=1)
        if self.max_ratio is not None:
            require("max_ratio", self.max_ratio, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        r = ratio(tokens) if self.max_ratio is None else ratio(tokens).clamp(max=self.max_ratio)
        value = -torch.minimum(r * advantage, r.clamp(1 - self.low, 1 + self.high) * advantage)
        weight = _inside(r, advantage, self.low, self.high).to(r.dtype)
        if self.dual is not None:
            value = torch.where(advantage < 0, torch.minimum(value, -self.dual * advantage), value)
            weight = torch.where((advantage < 0) & (r > self.dual), 0, weight)
        return token_loss(tokens, value, slope=-advantage * r * weight)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: r < 1 - low or r > 1 + high."""
        return _outside(ratio(tokens), self.low, self.high)


@dataclass(frozen=True)
class GSPO:
    """PPO's clip on the geometric mean of a sequence's ratios, applied to each of its tokens.

        s_i = exp(mean over kept tokens of (l - m));   loss = -min(s A, clip(s, 1 - low, 1 + high) A)

    The gradient at each token is that of s_i e^(l - sg l), so -A s_i where the clip does not bind: w = s_i / r or 0.

    Args:
        low: in [0, 1].
        high: >= 0.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> GSPO()
        GSPO(low=0.0003, high=0.0004)

    Source: Group Sequence Policy Optimization, arXiv 2507.18071, Eq. 7 and 13 (the token-level form).
    """

    low: float = 3e-4
    high: float = 4e-4
    tokenwise: ClassVar[bool] = False
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("low", self.low, above=0, below=1, closed=True)
        require("high", self.high, above=0, closed=True)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        s = _sequence_ratio(tokens)
        value = -torch.minimum(s * advantage, s.clamp(1 - self.low, 1 + self.high) * advantage)
        inside = _inside(s, advantage, self.low, self.high).to(s.dtype)
        return token_loss(tokens, value, slope=-advantage * s * inside)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: s < 1 - low or s > 1 + high, for every token of a sequence."""
        return _outside(_sequence_ratio(tokens), self.low, self.high)


def _sequence_ratio(tokens: Tokens) -> Tensor:
    """Return [T] the geometric mean s of the ratios of each token's sequence."""
    return Sequences.of(tokens).mean(log_ratio(tokens)).clamp(max=MAX_LOG_RATIO).exp()
