"""The rollouts of a run as the page's browser reads them: a table of completions and columns of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise, starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.report.conversation import remarks, utterances
from drpo.report.token_statistics import Rollouts
from drpo.report.vocabulary import Piece

Places = NDArray[np.uint32]
_PLAIN = ("step", "sample", "reward", "failure", "finish_reason", "version", "update", "advantage", "problem")


def vocabulary(rollouts: Rollouts) -> NDArray[np.int64]:
    """Return the token ids that occur, the most frequent first: their places are what the columns hold."""
    ids, counts = np.unique(rollouts.token_ids, return_counts=True)
    ordered: NDArray[np.int64] = ids[np.argsort(-counts, kind="stable")]
    return ordered


def table(rollouts: Rollouts, ids: NDArray[np.int64], pieces: Sequence[Piece] | None) -> dict[str, Any]:
    """Return all that is not one per token, column by column.

    Args:
        rollouts: of a run.
        ids: from `vocabulary`.
        pieces: what each stands for; None where there is no tokenizer.

    Returns:
        "questions": [prompt, answer] of each problem, once; "question": the place there; "text": None where the pieces
        or the conversation say it already; "state"; "gaps": spans of tokens that no update saw, where others of the
        completion were trained; "conversation": of an episode in an environment; the record's other fields; "pieces",
        "special" and "ids" of the vocabulary.
    """
    fields, nothing = rollouts.fields, [None] * len(rollouts)
    asked = [*zip(fields["prompt"], fields["answer"], strict=True)]
    place = {question: i for i, question in enumerate(dict.fromkeys(asked))}
    texts = None if pieces is None else ["" if p.special else p.text for p in pieces]
    known = None if texts is None else dict(zip(ids.tolist(), texts, strict=True))
    spans = list(starmap(slice, pairwise(rollouts.ends().tolist())))
    in_environment = [messages is not None for messages in fields.get("messages", nothing)]
    return {
        **{name: fields.get(name, nothing) for name in _PLAIN},
        "questions": [list(question) for question in place],
        "question": [place[question] for question in asked],
        "state": rollouts.states,
        "gaps": [_gaps(rollouts.trained[span]) for span in spans],
        "text": [
            None if talks else _unsaid(text, rollouts.token_ids[span], known)
            for talks, text, span in zip(in_environment, fields["text"], spans, strict=True)
        ],
        "conversation": [
            _conversation(rollouts.record(i), rollouts.lengths[i], rollouts.token_ids[span], known) if talks else None
            for i, (talks, span) in enumerate(zip(in_environment, spans, strict=True))
        ],
        "ids": ids.tolist(),
        "pieces": None if pieces is None else [p.text for p in pieces],
        "special": [] if pieces is None else [i for i, p in enumerate(pieces) if p.special],
        "n_all": rollouts.n_all,
    }


def _unsaid(text: str, ids: NDArray[np.int64], known: Mapping[int, str] | None) -> str | None:
    """A text; None where it is what these ids stand for, one after the other."""
    return None if known is not None and text == "".join([known[i] for i in ids.tolist()]) else text


def _gaps(trained: NDArray[np.bool_]) -> list[list[int]] | None:
    """Return the spans of a completion's tokens that were not trained; None where all were, or none."""
    if trained.all() or not trained.any():
        return None
    edges = np.flatnonzero(np.diff(np.pad((~trained).astype(np.int8), 1)))
    spans: list[list[int]] = edges.reshape(-1, 2).tolist()
    return spans


def _conversation(
    record: Mapping[str, Any], lengths: Sequence[int], ids: NDArray[np.int64], known: Mapping[int, str] | None
) -> dict[str, Any]:
    """The messages of an episode in an environment, its turns and what is to be said of it."""
    turns = record.get("turns", [])
    parts = np.split(ids, np.cumsum(turns)[:-1]) if turns else []
    said = [asdict(u) for u in utterances(record, lengths)]
    for one in said:
        if one["turn"] is not None:
            one["text"] = _unsaid(one["text"], parts[one["turn"]], known)
    failed = bool((record.get("played") or {}).get("failure"))
    return {"messages": said, "turns": turns, "remarks": remarks(record, lengths), "failed": failed}


def columns(rollouts: Rollouts, ids: NDArray[np.int64]) -> tuple[dict[str, Places], dict[str, list[float]]]:
    """Return what is one per token, and the numbers that these are places of.

    All tokens are in "token" and "mu", those that were trained also in the other columns. "advantage" is there where
    some completion has several; "length" and "n_trained" are one per completion.

    Args:
        rollouts: of a run.
        ids: from `vocabulary`.
    """
    order, seen, n_trained = np.argsort(ids, kind="stable"), rollouts.statistics, rollouts.n_trained()
    told = {"mu": three_digits(rollouts.mu)}
    for name in ("pi", "ratio", "prob_diff", "weight"):
        told[name] = three_digits(getattr(seen, name).astype(np.float64))
    some = n_trained > 0
    first = np.repeat(seen.advantage[(np.cumsum(n_trained) - n_trained)[some]], n_trained[some])
    if (seen.advantage != first).any():
        told["advantage"] = three_digits(seen.advantage.astype(np.float64))
    places = {
        "length": np.diff(rollouts.ends()).astype(np.uint32),
        "n_trained": n_trained.astype(np.uint32),
        "token": order[np.searchsorted(ids[order], rollouts.token_ids)].astype(np.uint32),
        "out_of_region": seen.out_of_region.astype(np.uint32),
    }
    return places | {name: at for name, (_, at) in told.items()}, {name: values for name, (values, _) in told.items()}


def three_digits(values: NDArray[np.float64]) -> tuple[list[float], Places]:
    """Return the decimals of three digits that occur, rising, and the place of each number among them.

    Example:
        >>> decimals, places = three_digits(np.array([0.5, 0.123456, -2.0, 0.0, 0.12349]))
        >>> decimals, places.tolist()
        ([-2.0, 0.0, 0.123, 0.5], [3, 2, 0, 1, 2])
    """
    size = np.where(values == 0, 1.0, np.abs(values))
    exponent = np.floor(np.log10(size)) - 2
    least, greatest = exponent.min(initial=0.0), exponent.max(initial=0.0)
    if not -300 < least <= greatest < 300:  # NaN too
        unit = 10.0 ** np.maximum(exponent, -307)  # below that it would be 0
        decimals, places = np.unique(np.rint(values / unit) * unit, return_inverse=True)
        return [float(f"{x:.3g}") for x in decimals], places.astype(np.uint32)
    # Numbers of three digits are few: those that occur are marked in a table, and all others need no sorting.
    units = 10.0 ** np.arange(least, greatest + 1)
    row = (exponent - least).astype(np.int64)
    digits = np.rint(values / units[row]).astype(np.int64)
    table = np.zeros((len(units), 2001), np.uint32)
    table[row, digits + 1000] = 1
    at = np.nonzero(table)
    decimals, place = np.unique((at[1] - 1000) * units[at[0]], return_inverse=True)
    table[at] = place
    return [float(f"{x:.3g}") for x in decimals], table[row, digits + 1000]
