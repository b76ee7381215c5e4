"""Groups of marked completions -> what each optimiser update trains on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor

from drpo.advantages import Advantage
from drpo.reductions import Reduction
from drpo.types import Batch, Completion, Group, Layout, MicroBatch, TopK


@dataclass(frozen=True)
class Batching:
    """How a rollout becomes batches.

    Args:
        updates: optimiser updates per rollout; each takes its share of the groups.
        advantage: rewards of a group -> advantages; None where a critic makes them of the rewards, which stand in their
            place until then, and where a group of one completion is as good as any.
        reduction: weight per token.
        micro_batch_tokens: most places that go through the model at once; one completion always may.
        skip_zero_advantage: leave out completions whose gradient is exactly 0; the normaliser still counts them.
        share_prompts: let a prompt that several completions continue go through the model once.
        ranks: processes that the micro-batches are for; there is work for each, where there are completions enough.
    """

    updates: int
    advantage: Advantage | None
    reduction: Reduction
    micro_batch_tokens: int
    skip_zero_advantage: bool
    share_prompts: bool = True
    ranks: int = 1


def make_batches(groups: Sequence[Group], how: Batching) -> list[Batch]:
    """Split a rollout's groups, in order, into the batches of its optimiser updates.

    A group left with fewer than two marked completions has nothing to compare and is dropped, unless a critic makes the
    advantages. All weights are fixed here, over each whole batch.

    Args:
        groups: of one rollout.
        how: see `Batching`.

    Returns:
        Up to `how.updates` batches; an update none of whose groups is usable is left out.
    """
    edges = [len(groups) * i // how.updates for i in range(how.updates + 1)]
    parts = [groups[start:end] for start, end in pairwise(edges)]
    least = 1 if how.advantage is None else 2
    usable = [[g for g in part if len(g.completions) >= least] for part in parts]
    return [_batch(part, how) for part in usable if part]


def untrained(completion: Completion) -> MicroBatch:
    """Return a micro-batch of one completion that counts nothing, for looking at what the policy says of it."""
    nothing = torch.zeros(len(completion.token_ids))
    return _micro_batch([_Row(completion, tuple(completion.prompt_ids.tolist()), 0, 0.0, 0, nothing)])


def split_micro_batch(
    micro: MicroBatch, completions: Sequence[Completion], budget: int, share_prompts: bool
) -> list[MicroBatch]:
    """Return the same completions, with the same weights, in micro-batches of at most `budget` places.

    Args:
        micro: to be split.
        completions: of its batch, as `MicroBatch.sequence` numbers them.
        budget: places; one completion always may take more.
        share_prompts: as of `Batching`.
    """
    rows = []
    for i in micro.sequence.unique().tolist():
        of_one = micro.sequence == i
        prompt = tuple(completions[i].prompt_ids.tolist())
        rows.append(_Row(completions[i], prompt, 0 if share_prompts else i, 0.0, i, micro.weight[of_one]))
    return [_as_before(_micro_batch(part), micro) for part in _within_budget(rows, budget)]


def _as_before(part: MicroBatch, micro: MicroBatch) -> MicroBatch:
    """What the tokens of a part had in the micro-batch that it is of."""
    own = torch.cat([(micro.sequence == i).nonzero()[:, 0] for i in part.sequence.unique_consecutive()])
    value, returns = (None if x is None else x[own] for x in (micro.value, micro.returns))
    return replace(part, advantage=micro.advantage[own], value=value, returns=returns)


@dataclass(frozen=True, eq=False)
class _Row:
    """One completion on its way into a batch; those of equal `prompt` and `alone` share what stands before them."""

    completion: Completion
    prompt: tuple[int, ...]
    alone: int
    advantage: float
    sequence: int
    weight: Tensor

    @property
    def own(self) -> Tensor:
        """What goes through the model after the prompt: the last token predicts nothing."""
        return self.completion.token_ids[:-1]

    @property
    def before(self) -> tuple[tuple[int, ...], int]:
        """Equal for rows that share their prompt's places."""
        return self.prompt, self.alone


def _batch(groups: Sequence[Group], how: Batching) -> Batch:
    completions = [c for g in groups for c in g.completions]
    advantages = torch.cat([g.rewards if how.advantage is None else how.advantage(g.rewards) for g in groups])
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    sequence = torch.arange(len(completions)).repeat_interleave(lengths)
    weights = how.reduction(torch.ones_like(sequence, dtype=torch.bool), sequence).split(lengths.tolist())
    rows = [
        _Row(c, tuple(c.prompt_ids.tolist()), 0 if how.share_prompts else i, a, i, w)
        for i, (c, a, w) in enumerate(zip(completions, advantages.tolist(), weights, strict=True))
    ]
    trained = [row for row in rows if row.advantage != 0 or not how.skip_zero_advantage]
    return Batch(
        micro_batches=tuple(_micro_batch(part) for part in _split(trained, how.micro_batch_tokens, how.ranks)),
        completions=tuple(completions),
        advantages=advantages,
        n_tokens=int(lengths.sum()),
        n_skipped=len(rows) - len(trained),
    )


def _split(rows: Sequence[_Row], budget: int, ranks: int) -> list[list[_Row]]:
    """Within the budget, and in about equal parts for the ranks: a prompt whose samples are parted counts in each."""
    prompts = {row.before: len(row.prompt) for row in rows}
    places = sum(prompts.values()) + sum(len(row.own) for row in rows)
    turns = max(1, math.ceil(places / (ranks * budget)))
    for slack in (1.0, 1.1, 1.25, 1.5):
        parts = _within_budget(rows, min(budget, math.ceil(slack * places / (ranks * turns))))
        if len(parts) <= ranks * turns:
            return parts
    return _within_budget(rows, budget) if ranks == 1 else parts


def _within_budget(rows: Sequence[_Row], budget: int) -> list[list[_Row]]:
    """Those of one prompt together, longest first, so that memory is asked for at the start or not at all."""
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
    """Segments being laid end to end."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.prefix: list[int] = []
        self._places = 0

    def add(self, ids: Tensor, prefix: int = -1) -> int:
        """Add one and return its first place."""
        first = self._places
        self.ids.append(ids)
        self.prefix.append(prefix)
        self._places += len(ids)
        return first

    def layout(self) -> Layout:
        return Layout(tuple(map(len, self.ids)), tuple(self.prefix))


def _micro_batch(rows: Sequence[_Row]) -> MicroBatch:
    segments = _Segments()
    position: list[Tensor] = []
    for (prompt, _), members in groupby(rows, key=lambda r: r.before):
        position += _place(segments, torch.tensor(prompt), [row.own for row in members])
    counts = torch.tensor([len(r.completion.token_ids) for r in rows])
    return MicroBatch(
        input_ids=torch.cat(segments.ids),
        layout=segments.layout(),
        position=torch.cat(position),
        target=torch.cat([r.completion.token_ids for r in rows]),
        behavior_logp=torch.cat([r.completion.behavior_logp for r in rows]),
        advantage=torch.tensor([r.advantage for r in rows]).repeat_interleave(counts),
        sequence=torch.tensor([r.sequence for r in rows]).repeat_interleave(counts),
        weight=torch.cat([r.weight for r in rows]),
        top=_top([r.completion for r in rows]),
    )


def _top(completions: Sequence[Completion]) -> TopK | None:
    """What the sampler reported of its likeliest tokens, where it did so for all, and for as many at each."""
    tops = [c.top for c in completions if c.top is not None]
    same = len(tops) == len(completions) and len({top.ids.shape[1] for top in tops}) == 1
    return TopK.cat(tops) if same else None


def _place(segments: _Segments, prompt: Tensor, answers: Sequence[Tensor]) -> list[Tensor]:
    """Lay a prompt and what follows it; return, for each answer, the places that predict its tokens."""
    if len(answers) == 1:
        first = segments.add(torch.cat([prompt, answers[0]]))
        return [first + len(prompt) - 1 + torch.arange(1 + len(answers[0]))]
    root = len(segments.ids)
    last = segments.add(prompt) + len(prompt) - 1
    places = []
    for answer in answers:
        first = segments.add(answer, root) if len(answer) else 0
        places.append(torch.cat([torch.tensor([last]), first + torch.arange(len(answer))]))
    return places
