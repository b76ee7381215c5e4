"""The records of training: Credit -> Batch of MicroBatches -> StepStats.

Shapes: T trained tokens, N positions of a micro-batch, R rows of one optimiser batch (a row is a `TokenSequence`).
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
    """The advantage of each of one sequence's M sampled tokens.

    Args:
        sequence: the sequence.
        advantage: [M] float32.
        value: [M] float32, reward units; the critic's value of each token's context, before it learns from the
            rollout; None without a critic, as is `returns`.
        returns: [M] float32, reward units; the critic's targets.

    Raises:
        InputError: a column of another shape than [M].
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
    """Segments end to end in a packed row, and the attention between them.

    A position attends to its own segment up to itself, and to all of its segment's prefix.

    Args:
        length: positions in each segment, >= 1.
        prefix: the segment that each continues, or -1; a prefix has no prefix itself.

    Example:
        >>> shared = Layout(length=(5, 2, 3), prefix=(-1, 0, 0))  # a prompt of 5 positions and two answers to it
        >>> shared.positions().tolist(), shared.n_positions
        ([0, 1, 2, 3, 4, 5, 6, 5, 6, 7], 10)
    """

    length: tuple[int, ...]
    prefix: tuple[int, ...]

    @property
    def n_positions(self) -> int:
        """N, the total number of positions."""
        return sum(self.length)

    def prefix_length(self, segment: int) -> int:
        """Return the length of the segment's prefix, 0 without one."""
        return self.length[self.prefix[segment]] if self.prefix[segment] >= 0 else 0

    def positions(self) -> Tensor:
        """Return each position's number in its own sequence, prefix included, [N] int64."""
        return torch.cat([self.prefix_length(s) + torch.arange(n) for s, n in enumerate(self.length)])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows in one forward pass, packed without padding, and their T trained tokens.

    A group's prompt appears once, followed by any number of rows that continue it.

    Args:
        input_ids: [N] int64; the segments of `layout`, end to end.
        layout: the segments and the attention between them.
        position: [T] int64 in [0, N); the position whose hidden state predicts the token.
        target: [T] int64; the sampled token ids.
        behavior_logp: [T] float32, nats.
        advantage: [T] float32.
        row: [T] int64 in [0, R); the number of the token's row among `Batch.credits`.
        sequence: [T] int64 >= 0; the objective's sequence that the token belongs to, numbered through the whole
            optimiser batch (`drpo.batch.BatchConfig.sequence`). All of a sequence's rows are here.
        weight: [T] float32; factor of each token's loss, fixed over the whole optimiser batch.
        top_logprobs: the sampler's most probable tokens at each of the T; None unless reported for all.
        value: [T] float32, see `Credit`; None without a critic, as is `returns`.
        returns: [T] float32, see `Credit`.
        routes: [N, L, k]; the experts to replay at each position, see `Routes`; None if no row has any.
        proximal_logp: [T] float32, see `TokenSequence`; None unless the objective needs it.
        score: [T] float32, reward units; what the task gave the token's episode; None in passes without rewards.
        reference_logp: [T] float32, see `TokenSequence`; None unless the objective needs it.
        routing_conflicts: choices that rows have for their shared prompt's positions, and that are not in `routes`,
            because another row's are.
    """

    input_ids: Tensor
    layout: Layout
    position: Tensor
    target: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    row: Tensor
    sequence: Tensor
    weight: Tensor
    top_logprobs: TopK | None = None
    value: Tensor | None = None
    returns: Tensor | None = None
    routes: Tensor | None = None
    proximal_logp: Tensor | None = None
    score: Tensor | None = None
    reference_logp: Tensor | None = None
    routing_conflicts: int = 0

    @property
    def place(self) -> Tensor:
        """[T] int64; rises along the tokens of each sequence, through all of its rows."""
        return self.row * len(self.input_ids) + self.position

    def tokens(self, logp: Tensor, divergence: Tensor | None = None) -> Tokens:
        """Return the tokens with the policy's log-probabilities `logp` [T] and its divergence [T] from the sampler."""
        keep = torch.ones_like(self.target, dtype=torch.bool)
        given = (self.behavior_logp, self.advantage, keep, self.sequence)
        return Tokens(logp, *given, divergence, self.place, self.proximal_logp, self.score, self.reference_logp)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device."""
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, top_logprobs=None if self.top_logprobs is None else self.top_logprobs.to(device))


@dataclass(frozen=True, eq=False)
class Batch:
    """The data of one optimiser update.

    Args:
        micro_batches: the trained rows, split by token budget.
        credits: one per row, R in all, including skipped ones; `MicroBatch.row` numbers them.
        n_episodes: the S of reductions, including skipped ones.
        n_tokens: trained tokens of the update, including skipped rows.
        n_skipped: rows left out because they have no gradient: all their advantages are exactly 0.
    """

    micro_batches: tuple[MicroBatch, ...]
    credits: tuple[Credit, ...]
    n_episodes: int
    n_tokens: int
    n_skipped: int


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Statistics of T trained tokens from one forward pass; all detached.

    Args:
        tokens: with `logp` from before the step.
        entropy: [T] nats; the policy's at each token.
        gradient: [T], d (the objective's loss) / d logp, before the token's weight.
        metrics: name -> [T], the objective's.
    """

    tokens: Tokens
    entropy: Tensor
    gradient: Tensor
    metrics: Mapping[str, Tensor]

    def cpu(self) -> "TokenStats":
        """Return a copy on the CPU."""
        metrics = {name: v.cpu() for name, v in self.metrics.items()}
        return TokenStats(self.tokens.cpu(), self.entropy.cpu(), self.gradient.cpu(), metrics)

    @staticmethod
    def cat(parts: "Sequence[TokenStats]") -> "TokenStats":
        """Return the tokens of all parts, in order; at least one part."""
        named = [p for p in parts if p.metrics]  # a part without tokens has no metrics
        return TokenStats(
            Tokens.cat([p.tokens for p in parts]),
            torch.cat([p.entropy for p in parts]),
            torch.cat([p.gradient for p in parts]),
            {name: torch.cat([p.metrics[name] for p in named]) for name in (named[0].metrics if named else ())},
        )

    @staticmethod
    def none(with_divergence: bool) -> "TokenStats":
        """Return the statistics of no tokens."""
        empty = torch.empty(0)
        tokens = Tokens(empty, empty, empty, empty.bool(), empty.long(), empty if with_divergence else None)
        return TokenStats(tokens, empty, empty, {})


@dataclass(frozen=True, eq=False)
class StepStats:
    """Statistics of one optimiser update; `drpo.train.metrics` computes the metrics from them.

    Args:
        token_stats: the update's T trained tokens, on the CPU.
        row: [T] int64; of each, see `MicroBatch.row`.
        loss: the batch's loss, reward units.
        grad_norm: L2 norm of the whole gradient before clipping.
        learning_rate: this step's.
        taken: False if the step was skipped because the gradient was not finite.
    """

    token_stats: TokenStats
    row: Tensor
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
        """[T] nats; the policy's entropy at each token."""
        return self.token_stats.entropy


@dataclass(frozen=True)
class CriticStats:
    """Statistics of one optimiser update of the critic.

    Args:
        loss: the batch's value loss.
        grad_norm: L2 norm of the whole gradient before clipping.
        clipped: tokens whose value moved by more than the clip.
        n_tokens: tokens of the batch.
        taken: False if the step was skipped because the gradient was not finite.
    """

    loss: float
    grad_norm: float
    clipped: int
    n_tokens: int
    taken: bool = True
