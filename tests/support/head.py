"""What tests of the head share: inputs, the usual way to a log-probability, and the fused loss with columns by name."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drpo.objectives import Objective
from drpo.ops import Head, PolicyLoss, SampledTokens, linear_policy_loss
from drpo.types import TopK

HEAD = 16
CHUNKS = (1, 5, 1000, None)
TEMPERATURES = (0.6, 1.0, 1.5)


def logits_at_once(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The usual way: the product in the inputs' dtype, the rest in float32 or wider, the gradient by autograd."""
    logits = hidden @ weight.to(hidden.dtype).T
    z = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
    return z.gather(-1, target[:, None])[:, 0], -(z.exp() * z).sum(-1)


def inputs(t: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000 * t + v)
    hidden = torch.randn(t, HEAD, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, HEAD, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(v, (t,), generator=generator)


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm())


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation's result holds, by storage, so that an expanded view counts little."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return result


def fused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    *,
    token_weight: Tensor,
    top_logprobs: TopK | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    **columns: Tensor,
) -> PolicyLoss:
    """Return `linear_policy_loss` of a head that is a weight alone."""
    tokens = SampledTokens(target, **columns, weight=token_weight, top_logprobs=top_logprobs)
    return linear_policy_loss(hidden, Head(weight), tokens, objective, temperature=temperature, chunk=chunk)
