"""Scored groups and their credit -> the batch of each optimiser update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from drpo.reductions import Reduction
from drpo.types import Batch, Credit, Layout, MicroBatch, ScoredGroup, TokenSequence, TopK


@dataclass(frozen=True)
class BatchConfig:
    """How a rollout is split into batches.

    Args:
        updates: optimiser updates per rollout; the groups are divided among them.
        reduction: weight per token.
        micro_batch_tokens: upper bound of positions per micro-batch; a single completion may exceed it.
        skip_zero_advantage: leave out completions whose advantages are all 0; the normaliser still counts them.
        share_prompts: run a prompt once for all completions that continue it.
        ranks: processes that share the micro-batches; each receives work if there are enough completions.
    """

    updates: int
    reduction: Reduction
    micro_batch_tokens: int
    skip_zero_advantage: bool
    share_prompts: bool = True
    ranks: int = 1


def make_batches(groups: Sequence[ScoredGroup], credits: Sequence[Credit], config: BatchConfig) -> list[Batch]:
    """Split a rollout's groups, in order, into the batches of its optimiser updates.

    A sequence without credit is not trained and counts nowhere. The weights are fixed here, over each whole batch.

    Args:
        groups: the groups of one rollout.
        credits: the credit of their sequences, as a credit rule returns it.
        config: see `BatchConfig`.

    Returns:
        Up to `config.updates` batches; updates without any credited sequence are left out.
    """
    of = {credit.sequence: credit for credit in credits}
    edges = [len(groups) * i // config.updates for i in range(config.updates + 1)]
    parts = [groups[start:end] for start, end in pairwise(edges)]
    credited = [[of[s] for g in part for s in g.sequences if s in of] for part in parts]
    return [_batch(part, config) for part in credited if part]


def pack(
    sequences: Sequence[TokenSequence], micro_batch_tokens: int, share_prompts: bool = True, ranks: int = 1
) -> Batch:
    """Return a batch of sequences with weights and credit 0, for forward passes alone.

    Args:
        sequences: `MicroBatch.sequence` numbers them.
        micro_batch_tokens, share_prompts, ranks: see `BatchConfig`.
    """
    credits = tuple(Credit(s, torch.zeros(s.n_sampled)) for s in sequences)
    rows = [_row(i, credit, credit.advantage, share_prompts) for i, credit in enumerate(credits)]
    micro_batches = tuple(_micro_batch(part) for part in _split(rows, micro_batch_tokens, ranks))
    return Batch(micro_batches, credits, n_tokens=sum(s.n_sampled for s in sequences), n_skipped=0)


def split_micro_batch(
    micro: MicroBatch, credits: Sequence[Credit], budget: int, share_prompts: bool
) -> list[MicroBatch]:
    """Return the same tokens, with the same credit and weights, in micro-batches of at most `budget` positions.

    Args:
        micro: the micro-batch to split.
        credits: the credits of its batch, numbered by `MicroBatch.sequence`.
        budget: positions; a single completion may exceed it.
        share_prompts: see `BatchConfig`.
    """
    numbers = micro.sequence.unique().tolist()
    rows = [_row(i, credits[i], micro.weight[micro.sequence == i], share_prompts) for i in numbers]
    return [_micro_batch(part) for part in _within_budget(rows, budget)]


@dataclass(frozen=True, eq=False)
class _Row:
    """One sequence of a batch; rows of equal `prompt` and `alone` share their prompt's positions."""

    credit: Credit
    prompt: tuple[int, ...]
    alone: int
    number: int
    weight: Tensor

    @property
    def sequence(self) -> TokenSequence:
        return self.credit.sequence

    @property
    def own(self) -> Tensor:
        """The input ids after the prompt; the last token predicts nothing and is left out."""
        return self.sequence.token_ids[:-1]

    @property
    def before(self) -> tuple[tuple[int, ...], int]:
        """Equal for rows that share their prompt's positions."""
        return self.prompt, self.alone


def _row(number: int, credit: Credit, weight: Tensor, share_prompts: bool) -> _Row:
    prompt = tuple(credit.sequence.prompt_ids.tolist())
    return _Row(credit, prompt, 0 if share_prompts else number, number, weight)


def _batch(credits: Sequence[Credit], config: BatchConfig) -> Batch:
    lengths = torch.tensor([len(c.advantage) for c in credits])
    sequence = torch.arange(len(credits)).repeat_interleave(lengths)
    weights = config.reduction(torch.ones_like(sequence, dtype=torch.bool), sequence).split(lengths.tolist())
    rows = [_row(i, c, w, config.share_prompts) for i, (c, w) in enumerate(zip(credits, weights, strict=True))]
    trained = [row for row in rows if row.credit.advantage.any() or not config.skip_zero_advantage]
    return Batch(
        micro_batches=tuple(_micro_batch(part) for part in _split(trained, config.micro_batch_tokens, config.ranks)),
        credits=tuple(credits),
        n_tokens=int(lengths.sum()),
        n_skipped=len(rows) - len(trained),
    )


def _split(rows: Sequence[_Row], budget: int, ranks: int) -> list[list[_Row]]:
    """Split rows into parts within the budget, about equal for the ranks; a prompt counts in each part that has it."""
    prompts = {row.before: len(row.prompt) for row in rows}
    positions = sum(prompts.values()) + sum(len(row.own) for row in rows)
    turns = max(1, math.ceil(positions / (ranks * budget)))
    for slack in (1.0, 1.1, 1.25, 1.5):
        parts = _within_budget(rows, min(budget, math.ceil(slack * positions / (ranks * turns))))
        if len(parts) <= ranks * turns:
            return parts
    return _within_budget(rows, budget) if ranks == 1 else parts


def _within_budget(rows: Sequence[_Row], budget: int) -> list[list[_Row]]:
    """Split rows within the budget, prompts kept together, longest first, so that memory peaks at the start."""
    longest: dict[tuple[tuple[int, ...], int], int] = {}
    for row in rows:
        longest[row.before] = max(longest.get(row.before, 0), len(row.prompt) + len(row.own))
    parts: list[list[_Row]] = []
    left = 0
    for row in sorted(rows, key=lambda r: (-longest[r.before], r.before, -len(r.own))):
        prompt_is_there = bool(parts) and parts[-1][-1].before == row.before
        cost = len(row.own) + (0 if prompt_is_there else len(row.prompt))
        if not parts or cost > left:
            parts.append([])
            left, cost = budget, len(row.own) + len(row.prompt)
        parts[-1].append(row)
        left -= cost
    return parts


class _Segments:
    """Builds a layout from segments."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.prefix: list[int] = []
        self._length = 0

    def add(self, ids: Tensor, prefix: int = -1) -> int:
        """Add a segment and return its first position."""
        first = self._length
        self.ids.append(ids)
        self.prefix.append(prefix)
        self._length += len(ids)
        return first

    def layout(self) -> Layout:
        return Layout(tuple(map(len, self.ids)), tuple(self.prefix))


def _micro_batch(rows: Sequence[_Row]) -> MicroBatch:
    segments = _Segments()
    position: list[Tensor] = []
    for (prompt, _), members in groupby(rows, key=lambda r: r.before):
        position += _add_prompt(segments, torch.tensor(prompt), [row.own for row in members])
    sequences = [r.sequence for r in rows]
    counts = torch.tensor([s.n_sampled for s in sequences])
    return MicroBatch(
        input_ids=torch.cat(segments.ids),
        layout=segments.layout(),
        position=torch.cat([p[s.sampled] for p, s in zip(position, sequences, strict=True)]),
        target=torch.cat([s.token_ids[s.sampled] for s in sequences]),
        behavior_logp=torch.cat([s.behavior_logp for s in sequences]),
        advantage=torch.cat([r.credit.advantage for r in rows]),
        sequence=torch.tensor([r.number for r in rows]).repeat_interleave(counts),
        weight=torch.cat([r.weight for r in rows]),
        top_logprobs=_top_logprobs(sequences),
        value=_joined([r.credit.value for r in rows]),
        returns=_joined([r.credit.returns for r in rows]),
    )


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate a critic's columns; None without a critic."""
    present = [column for column in columns if column is not None]
    return torch.cat(present) if present else None


def _top_logprobs(sequences: Sequence[TokenSequence]) -> TopK | None:
    """Concatenate the sequences' top log-probabilities; None unless all have them, with the same K."""
    tops = [s.top_logprobs for s in sequences if s.top_logprobs is not None]
    same = len(tops) == len(sequences) and len({top.ids.shape[1] for top in tops}) == 1
    return TopK.cat(tops) if same else None


def _add_prompt(segments: _Segments, prompt: Tensor, answers: Sequence[Tensor]) -> list[Tensor]:
    """Add a prompt and its answers; return, for each answer, the positions that predict its tokens."""
    if len(answers) == 1:
        first = segments.add(torch.cat([prompt, answers[0]]))
        return [first + len(prompt) - 1 + torch.arange(1 + len(answers[0]))]
    root = len(segments.ids)
    last = segments.add(prompt) + len(prompt) - 1
    positions = []
    for answer in answers:
        first = segments.add(answer, root) if len(answer) else 0
        positions.append(torch.cat([torch.tensor([last]), first + torch.arange(len(answer))]))
    return positions
