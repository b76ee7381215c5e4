"""A record of rollouts.jsonl, taken apart: its sequences, its sampled tokens, its turns; and what it must be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, TypedDict

import msgspec

Record = Mapping[str, Any]
_PER_SAMPLED = ("behavior_logp", "logp", "divergence", "proximal_logp", "reference_logp", "advantages")
"""Fields of a sequence with a number for each sampled token."""


class _Message(TypedDict, total=False):
    role: str
    content: str | list[Any] | None
    name: str | None
    tool_calls: list[dict[str, Any]] | None


class _Failure(TypedDict, total=False):
    text: str


class _Played(TypedDict):
    rewards: list[float]
    done: bool
    calls: list[int]
    failed_calls: list[int]
    failure: _Failure | None


class _Sequence(TypedDict, total=False):
    prompt_ids: list[int]
    token_ids: list[int]
    sampled: list[tuple[int, int]]
    behavior_logp: list[float]
    logp: list[float]
    divergence: list[float]
    proximal_logp: list[float]
    reference_logp: list[float]
    advantages: list[float]


class _Episode(_Sequence, total=False):
    earlier: list[float]
    reward_turns: list[float | list[float]]
    reward_penalties: list[float]
    messages: list[_Message]
    turns: list[int]
    played: _Played | None
    branches: list[_Sequence]


def sequences(record: Record) -> list[Record]:
    """Return the token sequences of an episode: the record's own, and its branches; none where it has no tokens.

    Example:
        >>> sequences({"token_ids": [7], "branches": [{"token_ids": [8]}]})[1]
        {'token_ids': [8]}
    """
    return [record, *record.get("branches", ())] if "token_ids" in record else []


def sampled_positions(sequence: Record) -> list[int]:
    """Return where among a sequence's "token_ids" those stand that the model sampled: everywhere, or in "sampled".

    Example:
        >>> sampled_positions({"token_ids": [7, 8, 9, 0], "sampled": [[0, 1], [3, 4]]})
        [0, 3]
    """
    spans = sequence.get("sampled", [(0, len(sequence["token_ids"]))])
    return [i for first, behind in spans for i in range(first, behind)]


def sampled_ids(sequence: Record) -> list[int]:
    """Return the token ids of a sequence that the model sampled."""
    ids: list[int] = sequence["token_ids"]
    return [ids[i] for i in sampled_positions(sequence)] if "sampled" in sequence else ids


def sampled_lengths(record: Record) -> list[int]:
    """Return the number of sampled tokens of each sequence of an episode.

    Example:
        >>> sampled_lengths({"token_ids": [7, 8, 9, 0], "sampled": [[0, 1], [2, 4]], "branches": [{"token_ids": [8]}]})
        [3, 1]
    """
    spans = (s.get("sampled", ((0, len(s["token_ids"])),)) for s in sequences(record))
    return [sum(behind - first for first, behind in of_one) for of_one in spans]


@dataclass(frozen=True)
class TrainedRow:
    """A token sequence that took part in an update with a gradient.

    Args:
        episode: place of its record among those given.
        tokens: its ids and what is known of them.
        units: for each of its sampled tokens, what the objective took as one sequence: the episode's place, and 0 or
            the turn.
        score: the reward of its episode, or None where the record has none.
    """

    episode: int
    tokens: Record
    units: tuple[tuple[int, int], ...]
    score: float | None = None


def trained_rows(records: Sequence[Record], sequence: str) -> list[TrainedRow]:
    """Return the token sequences of some episodes that have "logp", in order.

    Args:
        records: of rollouts.jsonl.
        sequence: the run's `objective.sequence`: "episode", or "turn".

    Example:
        >>> one, two = {"token_ids": [7, 8, 9], "logp": [-1] * 3}, {"token_ids": [0], "logp": [-1]}
        >>> rows = trained_rows([{**one, "turns": [2, 1, 1], "branches": [two]}], "turn")
        >>> [row.units for row in rows], unit_numbers(rows)
        ([((0, 0), (0, 0), (0, 1)), ((0, 2),)], [0, 0, 1, 2])
    """
    found = []
    for i, record in enumerate(records):
        lengths = sampled_lengths(record)
        turns = record.get("turns", [sum(lengths)]) if sequence == "turn" else [sum(lengths)]
        units = chain.from_iterable(((i, unit),) * n for unit, n in enumerate(turns))
        of_rows = [tuple(islice(units, n)) for n in lengths]
        pairs = zip(sequences(record), of_rows, strict=True)
        found += [TrainedRow(i, row, u, record.get("reward")) for row, u in pairs if "logp" in row]
    return found


def unit_numbers(rows: Sequence[TrainedRow]) -> list[int]:
    """Return the number of the objective's sequence for each token of some rows, counted from 0."""
    units = [unit for row in rows for unit in row.units]
    number = {unit: n for n, unit in enumerate(dict.fromkeys(units))}
    return [number[unit] for unit in units]


def token_scores(rows: Sequence[TrainedRow]) -> list[float] | None:
    """Return the reward of each sampled token's episode; None where a record has none.

    Example:
        >>> token_scores([TrainedRow(0, {}, ((0, 0), (0, 0)), 1.0)]), token_scores([TrainedRow(0, {}, ((0, 0),))])
        ([1.0, 1.0], None)
    """
    scores = [row.score for row in rows for _ in row.units]
    return None if None in scores else [score for score in scores if score is not None]


def token_advantages(sequence: Record) -> list[float]:
    """Return the advantage of each sampled token of a sequence that took part in an update.

    Example:
        >>> token_advantages({"behavior_logp": [-1.0, -2.0], "advantage": 0.5})
        [0.5, 0.5]
    """
    given: list[float] = sequence.get("advantages") or [sequence["advantage"]] * len(sequence["behavior_logp"])
    return given


def fault(record: Record) -> str | None:
    """Return what is wrong with the tokens, the messages or the turns of a record, in a line; None where nothing is.

    A field that is missing is no fault here: who needs it says so.
    """
    try:
        msgspec.convert(record, _Episode)
    except (msgspec.ValidationError, UnicodeError) as error:  # half a surrogate pair
        return str(error).replace("`", "").replace("$.", "")
    return next((said for said in map(_sequence_fault, sequences(record)) if said), None) or _turns_fault(record)


def _sequence_fault(sequence: Record) -> str | None:
    if "token_ids" not in sequence:
        return "a branch has no token_ids"
    n_tokens = len(sequence["token_ids"])
    ends = [end for span in sequence.get("sampled", [(0, n_tokens)]) for end in span]
    if not all(a <= b for a, b in pairwise([0, *ends, n_tokens])):
        return f"sampled must be spans that rise, within the {n_tokens} token_ids"
    n_sampled = sum(ends[1::2]) - sum(ends[::2])
    wrong = next((name for name in _PER_SAMPLED if len(sequence.get(name, range(n_sampled))) != n_sampled), None)
    return None if wrong is None else f"{len(sequence[wrong])} {wrong} of {n_sampled} sampled token_ids"


def _turns_fault(record: Record) -> str | None:
    if "turns" not in record:
        return None
    turns, played = record["turns"], record.get("played")
    n_sampled = sum(sampled_lengths(record))
    if min(turns, default=1) < 1 or sum(turns) != n_sampled:
        return f"turns must add up to the {n_sampled} sampled tokens, each at least 1"
    said = sum(m.get("role") == "assistant" for m in record.get("messages", ()))
    if "messages" in record and said < len(turns):
        return f"{said} messages of the assistant, but {len(turns)} turns"
    of_turns = {f"played.{name}": played[name] for name in ("rewards", "calls", "failed_calls")} if played else {}
    for name, values in [*of_turns.items(), ("reward_turns", record.get("reward_turns"))]:
        if values and len(values) != len(turns):
            return f"{len(values)} {name}, but {len(turns)} turns"
    return None
