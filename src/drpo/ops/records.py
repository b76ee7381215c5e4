"""Input and output of the fused loss: `SampledTokens` and `PolicyLoss`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drpo.checks import require_columns
from drpo.errors import InputError
from drpo.types import Tokens, TopK


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """T sampled tokens: `Tokens` without the policy's `logp`, with ids and weights.

    Args:
        target: [T] int64; ids of the sampled tokens.
        behavior_logp: [T] float32, nats, <= 0; as the sampler reported it.
        advantage: [T] float32, reward units.
        keep: [T] bool; which tokens are trained.
        sequence: [T] int64; which completion each belongs to.
        weight: [T] float32, >= 0; factor of each token's loss, fixed over the whole optimiser batch
            (`drpo.reductions`).
        top_logprobs: the sampler's most probable tokens at each of the T, for objectives whose `needs` names a
            divergence.
        position: [T] int64; sorts the tokens of one sequence, as of `Tokens`. None: they are in order.
        proximal_logp: [T] float32, nats, as of `Tokens`, or None.
        score: [T] float32, reward units, as of `Tokens`, or None.
        reference_logp: [T] float32, nats, as of `Tokens`, or None.

    Raises:
        InputError: a column of another shape, dtype or device; or, on the CPU, an impossible value at a token that is
            kept and has a weight above 0.

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
    top_logprobs: TopK | None = None
    position: Tensor | None = None
    proximal_logp: Tensor | None = None
    score: Tensor | None = None
    reference_logp: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, Tensor):
            raise InputError(f"tokens.target: must be a tensor, not {type(self.target).__name__}")
        like = ("target", self.target)
        require_columns("tokens.", {"keep": self.keep, "weight": self.weight}, like, self.keep)
        columns = {name: getattr(self, name) for name in ("behavior_logp", "advantage", "sequence")}
        given = {name: getattr(self, name) for name in ("position", "proximal_logp", "score", "reference_logp")}
        columns |= {name: values for name, values in given.items() if values is not None}
        require_columns("tokens.", columns, like, self.trained)
        if self.top_logprobs is not None:
            require_top_logprobs("tokens.", self.target, self.top_logprobs)

    @property
    def trained(self) -> Tensor:
        """[T] bool; tokens that are kept and have a weight above 0. The others have no effect."""
        return self.keep & (self.weight != 0)

    def tokens(self, logp: Tensor, divergence: Tensor | None = None) -> Tokens:
        """Return the tokens with the policy's log-probabilities `logp` [T] and its divergence [T] from the sampler."""
        given = (self.behavior_logp, self.advantage, self.keep, self.sequence)
        return Tokens(logp, *given, divergence, self.position, self.proximal_logp, self.score, self.reference_logp)

    def at(self, chosen: Tensor) -> "SampledTokens":
        """Return the tokens where `chosen` [T] is True."""
        columns: dict[str, Any] = {name: v[chosen] for name, v in vars(self).items() if isinstance(v, Tensor)}
        return SampledTokens(
            **columns, top_logprobs=None if self.top_logprobs is None else self.top_logprobs.at(chosen)
        )


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """The loss of T tokens, with the columns computed on the way; every column is [T], detached.

    Args:
        loss: a scalar, differentiable (once) in the hidden states, the head's weight and its bias.
        logp: log pi of the targets, nats, float32 or wider.
        entropy: the policy's at each token, nats.
        gradient: d (objective's loss) / d logp, before the token's weight.
        metrics: the objective's, and those of auxiliary losses, by name.
        divergence: the top-K divergence that the objective reads, or None.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    gradient: Tensor
    metrics: Mapping[str, Tensor]
    divergence: Tensor | None = None

    def spread(self, chosen: Tensor) -> "PolicyLoss":
        """Return this loss with columns [T], 0 where `chosen` [T] is False."""

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


def require_top_logprobs(who: str, target: Tensor, top: object) -> None:
    """Raise InputError unless `top` is a TopK with K >= 1 rows for the T of `target`."""
    if not isinstance(top, TopK):
        raise InputError(f"{who}top_logprobs: must be a drpo.types.TopK, not {type(top).__name__}")
    shape = top.ids.shape
    if len(shape) != 2 or shape[:1] != target.shape or shape[1] < 1 or top.logp.shape != shape:
        raise InputError(
            f"{who}top_logprobs.ids {list(shape)}, top_logprobs.logp {list(top.logp.shape)}, "
            f"target {list(target.shape)} do not fit [T, K], [T, K], [T]"
        )
