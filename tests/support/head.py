"""The fused loss, called with columns by name, as the tests' plain losses are."""

from torch import Tensor

from drpo.objectives import Objective
from drpo.ops import Head, PolicyLoss, SampledTokens, linear_policy_loss
from drpo.types import TopK


def fused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    *,
    token_weight: Tensor,
    top: TopK | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    **columns: Tensor,
) -> PolicyLoss:
    """Return `linear_policy_loss` of a head that is a weight alone."""
    tokens = SampledTokens(target, **columns, weight=token_weight, top=top)
    return linear_policy_loss(hidden, Head(weight), tokens, objective, temperature=temperature, chunk=chunk)
