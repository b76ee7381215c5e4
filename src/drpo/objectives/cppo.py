"""CPPO: DPPO's mask with a threshold that tightens along the sequence as its budget is spent."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require
from drpo.objectives.closed_form import masked_surrogate
from drpo.objectives.ratios import log_ratio, prob_diff, wide
from drpo.objectives.sequences import Sequences
from drpo.types import TokenLoss, Tokens

QUANTILE = 0.9
"""The quantile of a sequence's |pi - mu| that sets its budget."""


@dataclass(frozen=True)
class CPPO:
    """DPPO's Binary-TV mask with weights that fall along the sequence, and a budget for its prefix.

        loss = -r A M     w = M;   with max_ratio = c: loss = -A min(r, c) M, w = M min(r, c) / r
        M    = 1 iff A (r - 1) <= 0 or w_t |pi - mu| <= c_t
        w_t  = 1 - (1 - w_min) (t - 1) / (T - 1)
        c_t  = min(delta, delta + B sum_{j<t} w_j - sum_{j<t} w_j |D_j|)
        B    = clip(the 90 % quantile of |D| over the sequence, delta_b, 2 delta_b)

    Early tokens have less room, since all later ones depend on them. A token that moves back is kept, but spends
    budget, and so does one of A = 0. Positions count the sequence's kept tokens. With w_min = 1 and a large delta_b it
    is DPPO without a cap.

    Args:
        delta: threshold of one token, > 0, in units of probability.
        w_min: weight of the last token, in (0, 1].
        delta_b: least budget per token, > 0.
        horizon: T of w_t, >= 1; None: the sequence's own length. verl's open pull request has the padded width.
        max_ratio: c, > 0, or None for no cap; 20 in that pull request.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> CPPO()
        CPPO(delta=0.2, w_min=0.8, delta_b=0.02, horizon=None, max_ratio=None)

    Source: arXiv 2606.10968, Eq. 8 to 11 and 22, with Binary-TV; UniRL, `unirl/algorithms/cppo.py`. The paper's
    headline runs measure top-20 TV.
    """

    delta: float = 0.2
    w_min: float = 0.8
    delta_b: float = 0.02
    horizon: int | None = None
    max_ratio: float | None = None
    tokenwise: ClassVar[bool] = False
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"position"})

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)
        require("w_min", self.w_min, above=0)
        require("w_min", self.w_min, above=0, below=1, closed=True)
        require("delta_b", self.delta_b, above=0)
        whole = isinstance(self.horizon, int) and not isinstance(self.horizon, bool)
        if self.horizon is not None and not (whole and self.horizon >= 1):
            raise InputError(f"horizon={self.horizon!r} must be a whole number >= 1, or None")
        if self.max_ratio is not None:
            require("max_ratio", self.max_ratio, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        inward = advantage * log_ratio(tokens) <= 0
        most = torch.inf if self.max_ratio is None else self.max_ratio
        return masked_surrogate(tokens, inward | ~self.out_of_region(tokens), most)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: w_t |pi - mu| > c_t."""
        distance, sequences = prob_diff(tokens).abs(), Sequences.of(tokens)
        weight = self._weights(distance, sequences)
        budget = sequences.quantile(distance, QUANTILE).clamp(self.delta_b, 2 * self.delta_b)
        left = self.delta + budget * sequences.before(weight) - sequences.before(weight * distance)
        return weight * distance > left.clamp(max=self.delta)

    def _weights(self, like: Tensor, sequences: Sequences) -> Tensor:
        """Return w_t [T]; 1 for a token that is its sequence."""
        before = sequences.before(torch.ones_like(like))
        last = sequences.count(like) - 1 if self.horizon is None else torch.full_like(like, self.horizon - 1)
        return 1 - (1 - self.w_min) * before / last.clamp(min=1)
