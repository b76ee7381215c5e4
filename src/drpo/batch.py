"""Groups of marked completions -> what each optimiser update trains on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from drpo.advantages import Advantage
from drpo.reductions import Reduction
from drpo.types import Batch, Completion, Group, MicroBatch


@dataclass(frozen=True)
class Batching:
    """How a rollout becomes batches.

    Args:
        updates: optimiser updates per rollout; each takes its share of the groups.
        advantage: rewards of a group -> advantages.
        reduction: weight per token.
        micro_batch_tokens: most places, padding included, that go through the model at once; one completion always may.
        skip_zero_advantage: leave out completions whose gradient is exactly 0; the normaliser still counts them.
    """

    updates: int
    advantage: Advantage
    reduction: Reduction
    micro_batch_tokens: int
    skip_zero_advantage: bool


def make_batches(groups: Sequence[Group], how: Batching) -> list[Batch]:
    """Split a rollout's groups, in order, into the batches of its optimiser updates.

    A group left with fewer than two marked completions has nothing to compare and is dropped. All weights are fixed
    here, over each whole batch.

    Args:
        groups: of one rollout.
        how: see `Batching`.

    Returns:
        Up to `how.updates` batches; an update none of whose groups is usable is left out.
    """
    edges = [len(groups) * i // how.updates for i in range(how.updates + 1)]
    parts = [groups[start:end] for start, end in pairwise(edges)]
    usable = [[g for g in part if len(g.completions) >= 2] for part in parts]
    return [_batch(part, how) for part in usable if part]


@dataclass(frozen=True, eq=False)
class _Row:
    """One completion on its way into a batch."""

    completion: Completion
    advantage: float
    sequence: int
    weight: Tensor

    @property
    def length(self) -> int:
        """Places that go through the model: the last token predicts nothing."""
        return len(self.completion.prompt_ids) + len(self.completion.token_ids) - 1


def _batch(groups: Sequence[Group], how: Batching) -> Batch:
    completions = [c for g in groups for c in g.completions]
    advantages = torch.cat([how.advantage(g.rewards) for g in groups]).tolist()
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    sequence = torch.arange(len(completions)).repeat_interleave(lengths)
    weights = how.reduction(torch.ones_like(sequence, dtype=torch.bool), sequence).split(lengths.tolist())
    rows = [_Row(c, a, i, w) for i, (c, a, w) in enumerate(zip(completions, advantages, weights, strict=True))]
    trained = [row for row in rows if row.advantage != 0 or not how.skip_zero_advantage]
    return Batch(
        micro_batches=tuple(_micro_batch(part) for part in _within_budget(trained, how.micro_batch_tokens)),
        n_sequences=len(rows),
        n_tokens=int(lengths.sum()),
        n_skipped=len(rows) - len(trained),
    )


def _within_budget(rows: Sequence[_Row], budget: int) -> list[list[_Row]]:
    """Longest first, so that rows of like length share padding and memory is asked for at the start or not at all."""
    parts: list[list[_Row]] = []
    for row in sorted(rows, key=lambda r: -r.length):
        if parts and (len(parts[-1]) + 1) * parts[-1][0].length <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _micro_batch(rows: Sequence[_Row]) -> MicroBatch:
    width = rows[0].length
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        # Padding stands on the right, where causal attention cannot see it; its id does not matter.
        input_ids[b, : row.length] = torch.cat([row.completion.prompt_ids, row.completion.token_ids])[:-1]
    counts = torch.tensor([len(r.completion.token_ids) for r in rows])
    first = torch.tensor([b * width + len(r.completion.prompt_ids) - 1 for b, r in enumerate(rows)])
    return MicroBatch(
        input_ids=input_ids,
        position=torch.cat([f + torch.arange(n) for f, n in zip(first, counts, strict=True)]),
        target=torch.cat([r.completion.token_ids for r in rows]),
        behavior_logp=torch.cat([r.completion.behavior_logp for r in rows]),
        advantage=torch.tensor([r.advantage for r in rows]).repeat_interleave(counts),
        sequence=torch.tensor([r.sequence for r in rows]).repeat_interleave(counts),
        weight=torch.cat([r.weight for r in rows]),
    )
