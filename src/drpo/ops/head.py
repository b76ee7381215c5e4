"""The head of a language model: how a hidden state becomes logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.errors import InputError


@dataclass(frozen=True, eq=False)
class Head:
    """The output layer of a language model.

        x = scale (weight hidden + bias),   logits = soft_cap tanh(x / soft_cap),   or x without a soft cap

    Args:
        weight: [V, H] float; the output embedding; may have another dtype than the hidden states.
        bias: [V] float, in the units of `weight hidden`, or None.
        scale: > 0; Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`.
        soft_cap: > 0, nats, or None; Gemma 2's `final_logit_softcapping`.

    Raises:
        InputError: a weight or bias that is no float tensor or does not fit, or a scale or cap that is not positive.

    Example:
        >>> head = Head(torch.tensor([[100.0], [0.0]]), scale=0.5, soft_cap=30.0)
        >>> head.logits(torch.ones(1, 1)).round(decimals=2)
        tensor([[27.9300,  0.0000]])

    Source: the soft cap: Gemma 2, arXiv 2408.00118, section 2.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name, values in (("weight", self.weight), ("bias", self.bias)):
            if values is None and name == "bias":
                continue
            if not isinstance(values, Tensor):
                raise InputError(f"head.{name}: must be a tensor, not {type(values).__name__}")
            if not values.is_floating_point():
                raise InputError(f"head.{name} {values.dtype}: must be float; write {name}.float()")
            if values.device != self.weight.device:
                raise InputError(f"head.{name} is on {values.device}, head.weight on {self.weight.device}")
        if self.weight.ndim != 2 or (self.bias is not None and self.bias.shape != self.weight.shape[:1]):
            shape = None if self.bias is None else list(self.bias.shape)
            raise InputError(f"head.weight {list(self.weight.shape)}, head.bias {shape}: do not fit [V, H], [V]")
        for name, number in (("scale", self.scale), ("soft_cap", self.soft_cap)):
            if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
                raise InputError(f"head.{name}={number!r}: must be > 0 and finite")

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits [T, V] of hidden states [T, H], in the wider of their dtype and the weight's."""
        dtype = torch.promote_types(hidden.dtype, self.weight.dtype)
        x = hidden.to(dtype) @ self.weight.to(dtype).T
        if self.bias is not None:
            x = x + self.bias.to(dtype)
        x = x * self.scale if self.scale != 1 else x
        return x if self.soft_cap is None else self.soft_cap * torch.tanh(x / self.soft_cap)
