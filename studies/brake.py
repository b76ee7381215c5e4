"""DRPO's weight inside its region, DPPO's mask outside: the fourth corner of the comparison of what DRPO needs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives import DRPO, TokenLoss, Tokens, prob_diff


@dataclass(frozen=True)
class Brake:
    """DRPO without the pull back: a token that has left the region in the direction of its advantage is masked.

        w = max(0, 1 - sign(A) (pi - mu) / delta)

    Args:
        delta: radius of the region, > 0, in units of probability.

    Example:
        >>> from drpo.objectives import gradient_weight
        >>> pi, mu, yes = torch.tensor([0.5, 0.7]), torch.tensor([0.4, 0.4]), torch.tensor([True, True])
        >>> tokens = Tokens(pi.log(), mu.log(), torch.ones(2), yes, torch.zeros(2).long())
        >>> gradient_weight(Brake(0.2), tokens) + 0  # no sign of 0
        tensor([0.5000, 0.0000])
    """

    delta: float
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        outward = prob_diff(tokens) * tokens.advantage.sign() > self.delta
        return TokenLoss(torch.where(outward, 0, DRPO(self.delta)(tokens).loss))

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: |pi - mu| > delta."""
        return DRPO(self.delta).out_of_region(tokens)
