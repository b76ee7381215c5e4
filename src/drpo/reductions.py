"""Reductions: a weight per token, fixed over the whole optimiser batch when it is built.

The batch's loss is sum(weight * loss), so it cannot depend on how the batch is split. Every reduction maps

    keep [T] bool, sequence [T] int64   ->   weight [T] float32, 0 where not kept

S is the number of completions with a kept token, n_i the kept tokens of completion i, N = sum n_i. Tokens that are not
kept count nowhere, as if they were removed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.spec import Registry

Reduction = Callable[[Tensor, Tensor], Tensor]


def token_mean(keep: Tensor, sequence: Tensor) -> Tensor:
    """Return 1/N: every token has the same weight, so long completions count more.

    Args:
        keep: [T] bool.
        sequence: [T] int64; unused.

    Returns:
        [T] float32, summing to 1 (0 where nothing is kept).

    Example:
        >>> token_mean(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1]))
        tensor([0.3333, 0.3333, 0.0000, 0.3333])

    Source: DAPO, arXiv 2503.14476, Eq. 12.
    """
    return _weights(keep, torch.ones_like(sequence, dtype=torch.float64) * keep.sum())


def sequence_mean(keep: Tensor, sequence: Tensor) -> Tensor:
    """Return 1/(S n_i): every completion has the same weight, shared by its tokens.

    Args:
        keep: [T] bool.
        sequence: [T] int64, equal numbers for the tokens of one completion.

    Returns:
        [T] float32, summing to 1 (0 where nothing is kept).

    Example:
        >>> sequence_mean(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1]))
        tensor([0.2500, 0.2500, 0.0000, 0.5000])

    Source: GRPO, arXiv 2402.03300, Eq. 3.
    """
    n_sequences, length = _lengths(keep, sequence)
    return _weights(keep, n_sequences * length)


@dataclass(frozen=True)
class Horizon:
    """1/(S H): the same weight for every token, independent of the completion's length.

    Args:
        tokens: H >= 1; usually `max_new_tokens`.

    Returns:
        On a call: [T] float32.

    Raises:
        InputError: H < 1.

    Example:
        >>> Horizon(10)(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 1]))
        tensor([0.0500, 0.0500, 0.0000, 0.0500])

    Source: Dr. GRPO, arXiv 2503.20783; the setting of DRPO, arXiv 2606.09821.
    """

    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 1:
            raise InputError(f"horizon tokens={self.tokens!r}: must be a whole number >= 1")

    def __call__(self, keep: Tensor, sequence: Tensor) -> Tensor:
        n_sequences, _ = _lengths(keep, sequence)
        return _weights(keep, torch.full_like(sequence, n_sequences * self.tokens, dtype=torch.float64))


def _lengths(keep: Tensor, sequence: Tensor) -> tuple[int, Tensor]:
    """Return S, and the n_i of each token's completion [T]."""
    numbers, dense = sequence.unique(return_inverse=True)
    counts = torch.zeros(len(numbers), dtype=torch.float64, device=sequence.device).index_add_(0, dense, keep.double())
    return int((counts > 0).sum()), counts[dense]


def _weights(keep: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(keep, 1 / divisor.clamp(min=1), 0).float()


REGISTRY: Registry[Reduction] = Registry(
    "reduction", {"token_mean": token_mean, "sequence_mean": sequence_mean, "horizon": Horizon}
)

horizon = Horizon
