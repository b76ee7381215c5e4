"""Scored groups and their credit -> the batch of each optimiser update.

A row is one `TokenSequence`: most episodes have one, an episode that branched has several. Reductions count episodes.
What the objective takes as one sequence is `BatchConfig.sequence`; rows that have a sequence in common stay together,
in one micro-batch and so on one rank.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap

import torch
from torch import Tensor

from drpo.reductions import Reduction
from drpo.types import Batch, Credit, Episode, Layout, MicroBatch, Routes, ScoredGroup, TokenSequence, TopK
from drpo.types.routes import known, none_chosen


@dataclass(frozen=True)
class BatchConfig:
    """How a rollout is split into batches.

    Args:
        updates: optimiser updates per rollout; the groups are divided among them.
        reduction: weight per token; its sequences are episodes.
        micro_batch_tokens: upper bound of positions per micro-batch; rows that stay together may exceed it.
        skip_zero_advantage: leave out rows whose advantages are all 0, and those of the rows that stay with them; the
            normaliser still counts them.
        share_prompts: run a prompt once for all rows that continue it.
        ranks: processes that share the micro-batches; each receives work if there are enough rows.
        sequence: what the objective takes as one sequence: the sampled tokens of an "episode", of a "turn", or of a
            "row", which keeps no rows together; of these a tokenwise objective may have any.
    """

    updates: int
    reduction: Reduction
    micro_batch_tokens: int
    skip_zero_advantage: bool
    share_prompts: bool = True
    ranks: int = 1
    sequence: str = "episode"


def make_batches(groups: Sequence[ScoredGroup], credits: Sequence[Credit], config: BatchConfig) -> list[Batch]:
    """Split a rollout's groups, in order, into the batches of its optimiser updates.

    A row without credit is not trained and counts nowhere. The weights are fixed here, over each whole batch.

    Args:
        groups: the groups of one rollout.
        credits: the credit of their rows, as a credit rule returns it.
        config: see `BatchConfig`.

    Returns:
        Up to `config.updates` batches; updates without any credited row are left out.
    """
    credit_of = {credit.sequence: credit for credit in credits}
    results = [pair for g in groups for pair in zip(g.episodes, g.results, strict=True)]
    score_of = {sequence: result.whole for episode, result in results for sequence in episode.sequences}
    edges = [len(groups) * i // config.updates for i in range(config.updates + 1)]
    credited = [
        [e for g in groups[start:end] for e in g.episodes if any(s in credit_of for s in e.sequences)]
        for start, end in pairwise(edges)
    ]
    return [_batch(episodes, credit_of, score_of, config) for episodes in credited if episodes]


def pack(
    sequences: Sequence[TokenSequence], micro_batch_tokens: int, share_prompts: bool = True, ranks: int = 1
) -> Batch:
    """Return a batch of sequences with weights and credit 0, for forward passes alone; it keeps no rows together.

    Args:
        sequences: `MicroBatch.row` numbers them.
        micro_batch_tokens, share_prompts, ranks: see `BatchConfig`.
    """
    credits = tuple(Credit(s, torch.zeros(s.n_sampled)) for s in sequences)
    numbers = [torch.full((s.n_sampled,), i) for i, s in enumerate(sequences)]
    nothing = [None] * len(credits)
    weights = [credit.advantage for credit in credits]
    rows = _rows(range(len(credits)), credits, numbers, weights, nothing, share_prompts)
    micro_batches = tuple(_micro_batch(part) for part in _split(_together(rows), micro_batch_tokens, ranks))
    n_tokens = sum(s.n_sampled for s in sequences)
    return Batch(micro_batches, credits, n_episodes=len(credits), n_tokens=n_tokens, n_skipped=0)


def split_micro_batch(
    micro: MicroBatch, credits: Sequence[Credit], budget: int, share_prompts: bool
) -> list[MicroBatch]:
    """Return the same tokens, with the same credit and weights, in micro-batches of at most `budget` positions.

    Args:
        micro: the micro-batch to split; rows that have a sequence in common stay together.
        credits: the credits of its batch, numbered by `MicroBatch.row`.
        budget: positions; rows that stay together may exceed it.
        share_prompts: see `BatchConfig`.
    """
    numbers = micro.row.unique().tolist()
    tokens = [micro.row == number for number in numbers]
    rows = _rows(
        numbers,
        [credits[number] for number in numbers],
        [micro.sequence[own] for own in tokens],
        [micro.weight[own] for own in tokens],
        [None if micro.score is None else float(micro.score[own][0]) for own in tokens],
        share_prompts,
    )
    return [_micro_batch(part) for part in _within_budget(_together(rows), budget)]


def routes_of_rows(
    micro: MicroBatch, credits: Sequence[Credit], share_prompts: bool, routes: Tensor
) -> list[tuple[int, Routes]]:
    """Return the number of each row of a micro-batch, and its own part of what was chosen at all N positions.

    Args:
        micro: the micro-batch.
        credits: the credits of its batch, numbered by `MicroBatch.row`.
        share_prompts: see `BatchConfig`.
        routes: [N, L, k], see `Routes`.
    """
    numbers = micro.row.unique_consecutive().tolist()
    nothing, none = [torch.empty(0)] * len(numbers), [None] * len(numbers)
    rows, _, position = _placed(_rows(numbers, [credits[n] for n in numbers], nothing, nothing, none, share_prompts))
    prompts: dict[int, Tensor] = {}
    parts = []
    for row, at in zip(rows, position, strict=True):
        end = int(at[0]) + 1
        if end not in prompts:
            prompts[end] = routes[end - len(row.credit.sequence.prompt_ids) : end].clone()
        parts.append((row.number, Routes(prompts[end], torch.cat([routes[at[1:]], none_chosen(1, routes)]))))
    return parts


@dataclass(frozen=True, eq=False)
class _Row:
    """One `TokenSequence` of a batch; rows of equal `prompt` share their prompt's positions."""

    number: int
    credit: Credit
    sequence: Tensor
    weight: Tensor
    score: float | None
    prompt: int

    @property
    def own(self) -> Tensor:
        """The input ids after the prompt; the last token predicts nothing and is left out."""
        return self.credit.sequence.token_ids[:-1]


def _rows(
    numbers: Sequence[int],
    credits: Sequence[Credit],
    sequences: Sequence[Tensor],
    weights: Sequence[Tensor],
    scores: Sequence[float | None],
    share_prompts: bool,
) -> list[_Row]:
    """Return rows with their prompts numbered in the order of their ids."""
    ids = [tuple(credit.sequence.prompt_ids.tolist()) for credit in credits]
    prompts = [(prompt, 0 if share_prompts else number) for prompt, number in zip(ids, numbers, strict=True)]
    order = {prompt: i for i, prompt in enumerate(sorted(set(prompts)))}
    columns = zip(numbers, credits, sequences, weights, scores, [order[prompt] for prompt in prompts], strict=True)
    return list(starmap(_Row, columns))


def _batch(
    episodes: Sequence[Episode],
    credit_of: Mapping[TokenSequence, Credit],
    score_of: Mapping[TokenSequence, float],
    config: BatchConfig,
) -> Batch:
    columns = zip(
        (s for e in episodes for s in e.sequences),
        _numbers(episodes, "episode"),
        _numbers(episodes, config.sequence),
        strict=True,
    )
    credited = [(credit_of[s], episode, sequence) for s, episode, sequence in columns if s in credit_of]
    credits, episode_of, sequence_of = zip(*credited, strict=True)
    episode = torch.cat(episode_of)
    weights = config.reduction(torch.ones_like(episode, dtype=torch.bool), episode).split(list(map(len, episode_of)))
    scores = [score_of[credit.sequence] for credit in credits]
    rows = _rows(range(len(credits)), credits, sequence_of, weights, scores, config.share_prompts)
    trained = [
        unit
        for unit in _together(rows)
        if not config.skip_zero_advantage or any(r.credit.advantage.any() for r in unit)
    ]
    return Batch(
        micro_batches=tuple(_micro_batch(part) for part in _split(trained, config.micro_batch_tokens, config.ranks)),
        credits=credits,
        n_episodes=len(episodes),
        n_tokens=len(episode),
        n_skipped=len(rows) - sum(map(len, trained)),
    )


def _numbers(episodes: Sequence[Episode], sequence: str) -> tuple[Tensor, ...]:
    """Return, for each row of the episodes, the number of the sequence that each sampled token is of, [M] int64."""
    tokens_of = {
        "episode": [e.n_sampled for e in episodes],
        "turn": [n for e in episodes for n in e.turns],
        "row": [s.n_sampled for e in episodes for s in e.sequences],
    }
    counts = torch.tensor(tokens_of[sequence])
    number: Tensor = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.split(number, tokens_of["row"])


def _together(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Return the rows in units that must not be split: a sequence of the objective is whole in each."""
    units: dict[int, list[_Row]] = {}
    for row in rows:
        units.setdefault(int(row.sequence[0]), []).append(row)
    return list(units.values())


def _positions(rows: Iterable[_Row], there: Container[int] = ()) -> int:
    """Return how many positions rows add where some prompts are there already."""
    prompts = {row.prompt: len(row.credit.sequence.prompt_ids) for row in rows if row.prompt not in there}
    return sum(prompts.values()) + _own_positions(rows)


def _own_positions(rows: Iterable[_Row]) -> int:
    return sum(len(row.credit.sequence.token_ids) - 1 for row in rows)


def _split(units: Sequence[Sequence[_Row]], budget: int, ranks: int) -> list[list[_Row]]:
    """Split rows into parts within the budget, about equal for the ranks; a prompt counts in each part that has it."""
    positions = _positions([row for unit in units for row in unit])
    rounds = max(1, math.ceil(positions / (ranks * budget)))
    for slack in (1.0, 1.1, 1.25, 1.5):
        parts = _within_budget(units, min(budget, math.ceil(slack * positions / (ranks * rounds))))
        if len(parts) <= ranks * rounds:
            return parts
    return _within_budget(units, budget) if ranks == 1 else parts


def _within_budget(units: Sequence[Sequence[_Row]], budget: int) -> list[list[_Row]]:
    """Split rows within the budget, prompts kept together, longest first, so that memory peaks at the start."""
    longest: dict[int, int] = {}
    for unit in units:
        longest[unit[0].prompt] = max(longest.get(unit[0].prompt, 0), _positions(unit))
    parts: list[list[_Row]] = []
    prompts: set[int] = set()
    left = 0
    for unit in sorted(units, key=lambda u: (-longest[u[0].prompt], u[0].prompt, -_own_positions(u))):
        cost = _positions(unit, prompts)
        if not parts or cost > left:
            parts.append([])
            left, cost, prompts = budget, _positions(unit), set()
        parts[-1] += unit
        left -= cost
        prompts |= {row.prompt for row in unit}
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


def _placed(rows: Sequence[_Row]) -> tuple[list[_Row], _Segments, list[Tensor]]:
    """Return rows ordered by their prompts, their segments, and of each row the positions that predict its N tokens."""
    by_prompt: dict[int, list[_Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    segments = _Segments()
    position: list[Tensor] = []
    for first, *others in by_prompt.values():
        position += _add_prompt(segments, first.credit.sequence.prompt_ids, [row.own for row in (first, *others)])
    return [row for members in by_prompt.values() for row in members], segments, position


def _micro_batch(rows: Sequence[_Row]) -> MicroBatch:
    rows, segments, position = _placed(rows)
    sequences = [r.credit.sequence for r in rows]
    routes, conflicts = _routes(sequences, position, sum(map(len, segments.ids)))
    counts = torch.tensor([s.n_sampled for s in sequences])
    return MicroBatch(
        input_ids=torch.cat(segments.ids),
        layout=segments.layout(),
        position=torch.cat([p[s.sampled] for p, s in zip(position, sequences, strict=True)]),
        target=torch.cat([s.token_ids[s.sampled] for s in sequences]),
        behavior_logp=torch.cat([s.behavior_logp for s in sequences]),
        advantage=torch.cat([r.credit.advantage for r in rows]),
        row=torch.tensor([r.number for r in rows]).repeat_interleave(counts),
        sequence=torch.cat([r.sequence for r in rows]),
        weight=torch.cat([r.weight for r in rows]),
        top_logprobs=_top_logprobs(sequences),
        value=_joined([r.credit.value for r in rows]),
        returns=_joined([r.credit.returns for r in rows]),
        routes=routes,
        proximal_logp=_joined([s.proximal_logp for s in sequences]),
        reference_logp=_joined([s.reference_logp for s in sequences]),
        score=_joined(
            [None if r.score is None else torch.full((r.credit.sequence.n_sampled,), float(r.score)) for r in rows]
        ),
        routing_conflicts=conflicts,
    )


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate the rows' columns; None where they have none."""
    present = [column for column in columns if column is not None]
    return torch.cat(present) if present else None


def _top_logprobs(sequences: Sequence[TokenSequence]) -> TopK | None:
    """Concatenate the sequences' top log-probabilities; None unless all have them, with the same K."""
    tops = [s.top_logprobs for s in sequences if s.top_logprobs is not None]
    same = len(tops) == len(sequences) and len({top.ids.shape[1] for top in tops}) == 1
    return TopK.cat(tops) if same else None


def _routes(sequences: Sequence[TokenSequence], position: Sequence[Tensor], n: int) -> tuple[Tensor | None, int]:
    """Return the experts to replay at each of n positions, and how many choices of rows are others than these.

    A shared prompt's position has the choice of the first row that has one there.
    """
    given = [(s.routes, at) for s, at in zip(sequences, position, strict=True) if s.routes is not None]
    if not given:
        return None, 0
    routes, conflicts = none_chosen(n, given[0][0].tokens), 0
    first: dict[int, Tensor] = {}
    for of_row, at in given:
        routes[at[1:]] = of_row.tokens[:-1]
        own, end = of_row.prompt, int(at[0]) + 1
        if own is not first.get(end):
            prompt = routes[end - len(own) : end]
            lacking = ~known(prompt)
            prompt[lacking] = own[lacking]
            differs = (prompt.sort(-1).values != own.sort(-1).values).flatten(1).any(1)
            conflicts += int((differs & known(own)).sum())
        first.setdefault(end, own)
    return routes, conflicts


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
