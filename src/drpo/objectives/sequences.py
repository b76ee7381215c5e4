"""Statistics of sequences: of the kept tokens of each, returned at every token of it; and of a whole batch.

Every function has fixed shapes and never asks the device for a number. Tokens that are not kept count nowhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.types import Tokens


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of T tokens.

    Args:
        keep: [T] bool.
        number: [T] int64 in [0, T); equal numbers mean the same sequence.
        position: [T] int64; rises along each sequence.
    """

    keep: Tensor
    number: Tensor
    position: Tensor

    @staticmethod
    def of(tokens: Tokens) -> "Sequences":
        """Return the sequences of tokens; any sequence numbers are allowed.

        Example:
            >>> one = torch.ones(3)
            >>> tokens = Tokens(-one, -one, one, torch.tensor([True, True, False]), torch.tensor([7, 7, 7]))
            >>> Sequences.of(tokens).mean(torch.tensor([1.0, 2.0, 5.0]))
            tensor([1.5000, 1.5000, 1.5000])
        """
        # Sorting numbers the sequences densely, without a device sync.
        ordered, order = tokens.sequence.sort()
        rank = torch.zeros_like(order)
        rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        number = torch.empty_like(order).scatter_(0, order, rank)
        return Sequences(tokens.keep, number, _positions(tokens))

    @staticmethod
    def whole(tokens: Tokens) -> "Sequences":
        """Return all tokens as one sequence: a batch, in the order given."""
        return Sequences(tokens.keep, torch.zeros_like(tokens.sequence), _positions(tokens))

    def sum(self, values: Tensor) -> Tensor:
        """Return [T] the sum over the kept tokens of each token's sequence."""
        kept = torch.where(self.keep, values, 0).to(widest(values))
        return torch.zeros_like(kept).scatter_add_(0, self.number, kept)[self.number].to(values.dtype)

    def count(self, like: Tensor) -> Tensor:
        """Return [T] the number of kept tokens of each token's sequence, in the dtype of `like`."""
        return self.sum(torch.ones_like(like))

    def mean(self, values: Tensor) -> Tensor:
        """Return [T] the mean over the kept tokens of each token's sequence; 0 where it has none."""
        return self.sum(values) / self.count(values).clamp(min=1)

    def max(self, values: Tensor) -> Tensor:
        """Return [T] the largest value of the kept tokens of each token's sequence; -inf where it has none."""
        kept = torch.where(self.keep, values, -torch.inf)
        return torch.full_like(values, -torch.inf).scatter_reduce_(0, self.number, kept, "amax")[self.number]

    def before(self, values: Tensor) -> Tensor:
        """Return [T] the sum over the kept tokens of the same sequence that stand before each token."""
        order = self._sorted(self.position)
        kept = torch.where(self.keep, values, 0)[order].to(widest(values))
        exclusive = kept.cumsum(0) - kept
        return torch.empty_like(values).scatter_(0, order, (exclusive - exclusive[self._first(order)]).to(values.dtype))

    def quantile(self, values: Tensor, q: float) -> Tensor:
        """Return [T] a quantile of the kept tokens of each token's sequence, linear between two of them.

        Args:
            values: [T], finite.
            q: in [0, 1].
        """
        order = self._sorted(torch.where(self.keep, values, torch.inf))
        first = self._first(order)
        last = self.count(values)[order].clamp(min=1) - 1
        place = q * last
        low = place.floor()
        high = torch.minimum(low + 1, last)
        ordered = values[order]
        below, above = ordered[first + low.long()], ordered[first + high.long()]
        return torch.empty_like(values).scatter_(0, order, below + (place - low) * (above - below))

    def _sorted(self, key: Tensor) -> Tensor:
        """Return the order [T] of the tokens by sequence, and within each by `key`."""
        by_key = key.argsort()
        return by_key[self.number[by_key].argsort(stable=True)]

    def _first(self, order: Tensor) -> Tensor:
        """Return for each token in this order where its sequence begins in it, [T]."""
        sizes = torch.zeros_like(self.number).scatter_add_(0, self.number, torch.ones_like(self.number))
        return (sizes.cumsum(0) - sizes)[self.number[order]]


def _positions(tokens: Tokens) -> Tensor:
    if tokens.position is not None:
        return tokens.position
    return torch.arange(len(tokens.sequence), device=tokens.sequence.device)


def widest(values: Tensor) -> torch.dtype:
    """Return the dtype of running sums: float64, where the device has it."""
    return values.dtype if values.device.type == "mps" else torch.float64
