"""What the fused loss reads of each token, and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drpo.checks import require_columns
from drpo.errors import InputError
from drpo.types import TopK


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """What is known of T tokens before the policy reads them: `Tokens` without `logp`, with ids and weights.

    Args:
        target: [T] int64; ids of the tokens that were sampled.
        behavior_logp: [T] float32, nats, <= 0; as the sampler reported it.
        advantage: [T] float32, reward units.
        keep: [T] bool; which tokens are trained.
        sequence: [T] int64; which completion each belongs to.
        weight: [T] float32, >= 0; what each token's loss counts, fixed over the whole optimiser batch
            (`drpo.reductions`).
        top: the sampler's likeliest tokens at each of the T, for objectives whose `needs` names a divergence.

    Raises:
        InputError: a column of another shape, dtype or device; or, on the CPU, a possible value missing at a token that
            is kept and weighs more than 0.

    Example:
        >>> import torch
        >>> one = torch.ones(1)
        >>> SampledTokens(one.long(), -one, one, one.bool(), one.long(), one).trained
        tensor([True])
    """

    target: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    keep: Tensor
    sequence: Tensor
    weight: Tensor
    top: TopK | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, Tensor):
            raise InputError(f"tokens.target: must be a tensor, not {type(self.target).__name__}")
        like = ("target", self.target)
        require_columns("tokens.", {"keep": self.keep, "weight": self.weight}, like, self.keep)
        columns = {name: getattr(self, name) for name in ("behavior_logp", "advantage", "sequence")}
        require_columns("tokens.", columns, like, self.trained)
        if self.top is not None:
            require_top("tokens.", self.target, self.top)

    @property
    def trained(self) -> Tensor:
        """[T] bool; the tokens that are kept and weigh more than 0: the others have no effect."""
        return self.keep & (self.weight != 0)

    def at(self, chosen: Tensor) -> "SampledTokens":
        """Return the tokens where `chosen` [T] is True."""
        columns: dict[str, Any] = {name: v[chosen] for name, v in vars(self).items() if isinstance(v, Tensor)}
        return SampledTokens(**columns, top=None if self.top is None else self.top.at(chosen))


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The loss of T tokens, and what was computed on the way; every column is [T], detached.

    Args:
        loss: a scalar, differentiable (once) in the hidden states, the head's weight and its bias.
        logp: log pi of the targets, nats, float32 or wider.
        entropy: of the policy at each token, nats.
        gradient: d (objective's loss) / d logp, before the token's weight.
        metrics: the objective's own, by name.
        divergence: the top-K divergence that the objective reads, or None where it reads none.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    gradient: Tensor
    metrics: Mapping[str, Tensor]
    divergence: Tensor | None = None

    def spread(self, chosen: Tensor) -> "PolicyLoss":
        """Return the same with columns [T] that are 0 where `chosen` [T] is False."""

        def column(values: Tensor) -> Tensor:
            return values.new_zeros(chosen.shape).masked_scatter(chosen, values)

        return PolicyLoss(
            self.loss,
            column(self.logp),
            column(self.entropy),
            column(self.gradient),
            {name: column(values) for name, values in self.metrics.items()},
            None if self.divergence is None else column(self.divergence),
        )


def require_top(who: str, target: Tensor, top: object) -> None:
    """Raise InputError unless `top` is a TopK with K >= 1 rows for the T of `target`."""
    if not isinstance(top, TopK):
        raise InputError(f"{who}top: must be a drpo.types.TopK, not {type(top).__name__}")
    shape = top.ids.shape
    if len(shape) != 2 or shape[:1] != target.shape or shape[1] < 1 or top.logp.shape != shape:
        raise InputError(
            f"{who}top.ids {list(shape)}, top.logp {list(top.logp.shape)}, target {list(target.shape)} "
            "do not fit [T, K], [T, K], [T]"
        )
