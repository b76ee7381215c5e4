"""The head operator's definition in a few lines; it holds all logits [T, V]."""

import torch
from torch import Tensor

from drpo.ops.head import Head


def linear_logprob(hidden: Tensor, head: Head, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits / temperature)[target] and the softmax's entropy, in float32 throughout.

    Args, Returns: as `drpo.ops.linear_logprob`; this is its definition.

    Example:
        >>> logp, entropy = linear_logprob(torch.zeros(1, 3), Head(torch.ones(4, 3)), torch.tensor([2]))
        >>> logp.exp(), entropy.exp()
        (tensor([0.2500]), tensor([4.]))
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp = torch.log_softmax(head.logits(hidden.to(wide)) / temperature, dim=-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
