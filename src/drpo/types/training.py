"""The records of training: Credit -> Batch of MicroBatches -> StepStats.

Letters in shapes: T trained tokens, N positions of a micro-batch, S sequences of one optimiser batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.types.rollout import TokenSequence
from drpo.types.tokens import Tokens, TopK


@dataclass(frozen=True, eq=False)
class Credit:
    """What the M sampled tokens of one sequence are credited with.

    Args:
        sequence: whose they are.
        advantage: [M] float32.
        value: [M] float32, reward units; a critic's, of the context of each token, before it learns from the rollout;
            None without a critic, as `returns`.
        returns: [M] float32, reward units; what the values should have been.

    Raises:
        InputError: a column that has not one number for each sampled token.
    """

    sequence: TokenSequence
    advantage: Tensor
    value: Tensor | None = None
    returns: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.sequence.behavior_logp.shape
        for name in ("advantage", "value", "returns"):
            column = getattr(self, name)
            if column is not None and column.shape != shape:
                raise InputError(f"credit.{name} {list(column.shape)}: must be {list(shape)}, one for each token")


@dataclass(frozen=True)
class Layout:
    """Which positions of a packed row attend to which: segments laid end to end.

    A position attends to its own segment up to itself, and to the whole of the segment that its own continues.

    Args:
        length: positions in each segment, >= 1.
        prefix: the segment that each continues, or -1; a prefix has none itself.

    Example:
        >>> shared = Layout(length=(5, 2, 3), prefix=(-1, 0, 0))  # a prompt of 5 positions and two answers to it
        >>> shared.positions().tolist(), shared.n_positions
        ([0, 1, 2, 3, 4, 5, 6, 5, 6, 7], 10)
    """

    length: tuple[int, ...]
    prefix: tuple[int, ...]

    @property
    def n_positions(self) -> int:
        """N, positions in all."""
        return sum(self.length)

    def prefix_length(self, segment: int) -> int:
        """Places that stand before the segment's first."""
        return self.length[self.prefix[segment]] if self.prefix[segment] >= 0 else 0

    def positions(self) -> Tensor:
        """[N] int64; how many positions each position's own sequence has before it."""
        return torch.cat([self.prefix_length(s) + torch.arange(n) for s, n in enumerate(self.length)])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Completions that go through the model together, packed without padding, and the T tokens that are trained.

    The prompt of a group stands there once, however many of its completions follow.

    Args:
        input_ids: [N] int64; the segments of `layout`, end to end.
        layout: which positions attend to which.
        position: [T] int64 in [0, N): where the hidden state stands that predicts the token.
        target: [T] int64; the sampled token ids.
        behavior_logp: [T] float32, nats.
        advantage: [T] float32.
        sequence: [T] int64 in [0, S), numbered through the whole optimiser batch.
        weight: [T] float32; what each token's loss counts, fixed over the whole optimiser batch.
        top_logprobs: the sampler's most probable tokens at each of the T, or None where it did not report them for all.
        value: [T] float32, as of `Credit`; None without a critic, as `returns`.
        returns: [T] float32, as of `Credit`.
    """

    input_ids: Tensor
    layout: Layout
    position: Tensor
    target: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    sequence: Tensor
    weight: Tensor
    top_logprobs: TopK | None = None
    value: Tensor | None = None
    returns: Tensor | None = None

    def tokens(self, logp: Tensor, divergence: Tensor | None = None) -> Tokens:
        """These tokens with the current policy's log-probabilities `logp` [T], and how far it has moved at each [T]."""
        keep = torch.ones_like(self.target, dtype=torch.bool)
        return Tokens(logp, self.behavior_logp, self.advantage, keep, self.sequence, divergence)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, top_logprobs=None if self.top_logprobs is None else self.top_logprobs.to(device))


@dataclass(frozen=True, eq=False)
class Batch:
    """What one optimiser update trains on.

    Args:
        micro_batches: the completions that go through the model, split by token budget.
        credits: of the S completions of the update, skipped ones too; `MicroBatch.sequence` numbers them.
        n_tokens: kept tokens in the update, skipped ones too.
        n_skipped: completions whose every advantage, and so whose gradient, is exactly 0.
    """

    micro_batches: tuple[MicroBatch, ...]
    credits: tuple[Credit, ...]
    n_tokens: int
    n_skipped: int

    @property
    def n_sequences(self) -> int:
        """S; the normaliser counts the skipped ones too."""
        return len(self.credits)


@dataclass(frozen=True, eq=False)
class TokenStats:
    """What a pass over T trained tokens saw of each; all detached.

    Args:
        tokens: with `logp` as it was before the step.
        entropy: [T] nats, of the policy at each of them.
        gradient: [T], d (the objective's loss) / d logp, before the token's weight.
        metrics: name -> [T], the objective's own.
    """

    tokens: Tokens
    entropy: Tensor
    gradient: Tensor
    metrics: Mapping[str, Tensor]

    def cpu(self) -> "TokenStats":
        """The same on the CPU."""
        columns = {name: v.cpu() for name, v in vars(self.tokens).items() if v is not None}
        metrics = {name: v.cpu() for name, v in self.metrics.items()}
        return TokenStats(Tokens(**columns), self.entropy.cpu(), self.gradient.cpu(), metrics)

    @staticmethod
    def cat(parts: "Sequence[TokenStats]") -> "TokenStats":
        """The tokens of all parts, in order; at least one part."""
        named = [p for p in parts if p.metrics]  # of no tokens nothing is known
        return TokenStats(
            Tokens.cat([p.tokens for p in parts]),
            torch.cat([p.entropy for p in parts]),
            torch.cat([p.gradient for p in parts]),
            {name: torch.cat([p.metrics[name] for p in named]) for name in (named[0].metrics if named else ())},
        )

    @staticmethod
    def none(with_divergence: bool) -> "TokenStats":
        """Those of no tokens."""
        empty = torch.empty(0)
        tokens = Tokens(empty, empty, empty, empty.bool(), empty.long(), empty if with_divergence else None)
        return TokenStats(tokens, empty, empty, {})


@dataclass(frozen=True, eq=False)
class StepStats:
    """What one optimiser update saw and did; `drpo.train.metrics` turns it into figures.

    Args:
        token_stats: of the T trained tokens of the whole update, on the CPU.
        loss: the batch's loss, reward units.
        grad_norm: L2 norm of the whole gradient before clipping.
        learning_rate: of this step.
        taken: False where the gradient was not finite, so that no step was taken.
    """

    token_stats: TokenStats
    loss: float
    grad_norm: float
    learning_rate: float
    taken: bool = True

    @property
    def tokens(self) -> Tokens:
        """The T trained tokens."""
        return self.token_stats.tokens

    @property
    def entropy(self) -> Tensor:
        """[T] nats, of the policy at each of them."""
        return self.token_stats.entropy


@dataclass(frozen=True)
class CriticStats:
    """What one optimiser update of a critic saw and did.

    Args:
        loss: the batch's value loss.
        grad_norm: L2 norm of the whole gradient before clipping.
        clipped: tokens whose value had moved further than the clip.
        n_tokens: of the batch.
        taken: False where the gradient was not finite, so that no step was taken.
    """

    loss: float
    grad_norm: float
    clipped: int
    n_tokens: int
    taken: bool = True
