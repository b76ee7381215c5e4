"""Which experts of a mixture read the tokens of a sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.errors import InputError


@dataclass(frozen=True, eq=False)
class Routes:
    """The experts that a sampler's routers chose for the P tokens of a prompt and for the N tokens after it.

    A token that the sampler did not read itself has no choice: its entries are all `missing`. Such are a sequence's
    last token, whatever a cache had of an earlier request, and padding.

    Args:
        prompt: [P, L, k] uint8 or int16: k experts for each of the L layers that have any; samples of one prompt hold
            the same tensor.
        tokens: [N, L, k], of the same dtype.

    Raises:
        InputError: other shapes or dtypes.

    Example:
        >>> prompt = torch.zeros(3, 2, 1, dtype=torch.uint8)
        >>> Routes(prompt, torch.tensor([[[4], [1]], [[255], [255]]], dtype=torch.uint8)).known().tolist()
        [True, True, True, True, False]
    """

    prompt: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        same = self.prompt.shape[1:] == self.tokens.shape[1:] and self.prompt.dtype == self.tokens.dtype
        if self.prompt.ndim != 3 or not same or self.tokens.dtype not in (torch.uint8, torch.int16):
            raise InputError(
                f"routes of {list(self.prompt.shape)} {self.prompt.dtype} and {list(self.tokens.shape)} "
                f"{self.tokens.dtype}: must be [tokens, layers, experts per token], both uint8 or both int16"
            )

    def known(self) -> Tensor:
        """Return where every layer has a choice, [P + N] bool."""
        return torch.cat([known(self.prompt), known(self.tokens)])


def compact(n_experts: int) -> torch.dtype:
    """Return the smallest dtype that has the number of every expert, and one more that stands for none."""
    return torch.uint8 if n_experts < missing(torch.uint8) else torch.int16


def missing(dtype: torch.dtype) -> int:
    """Return the number that means "no choice": the dtype's largest."""
    return torch.iinfo(dtype).max


def none_chosen(n: int, like: Tensor) -> Tensor:
    """Return the choices [n, L, k] of n tokens that have none."""
    return like.new_full((n, *like.shape[1:]), missing(like.dtype))


def known(choices: Tensor) -> Tensor:
    """Return which of n tokens [n, L, k] have a choice in every layer, [n] bool."""
    return (choices != missing(choices.dtype)).flatten(1).all(1)
