"""The rollouts of a run as the page's browser reads them: a table of completions and columns of tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.report import decimals
from drpo.report.token_statistics import Rollouts, Sampled
from drpo.report.vocabulary import Piece

_PLAIN = ("step", "sample", "reward", "failure", "finish_reason", "version", "update", "advantage", "problem")


def vocabulary(rollouts: Rollouts) -> NDArray[np.int64]:
    """Return the token ids that occur, the most frequent first: their places are what the columns hold."""
    ids, counts = np.unique(_all(rollouts.completions, lambda c: c.token_ids, np.int64), return_counts=True)
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
        say it already; "state"; the record's other fields; "pieces", "special" and "ids" of the vocabulary.
    """
    records = [c.record for c in rollouts.completions]
    questions = {(r["prompt"], r["answer"]): None for r in records}
    place = {question: i for i, question in enumerate(questions)}
    known = None if pieces is None else dict(zip(ids.tolist(), pieces, strict=True))
    return {
        **{name: [r.get(name) for r in records] for name in _PLAIN},
        "questions": [list(q) for q in questions],
        "question": [place[r["prompt"], r["answer"]] for r in records],
        "state": [c.state for c in rollouts.completions],
        "text": [None if known and _spelled(c, known) else c.record["text"] for c in rollouts.completions],
        "ids": ids.tolist(),
        "pieces": None if pieces is None else [p.text for p in pieces],
        "special": [] if pieces is None else [i for i, p in enumerate(pieces) if p.special],
        "n_all": rollouts.n_all,
    }


def _spelled(completion: Sampled, known: Mapping[int, Piece]) -> bool:
    """Whether a completion's text is its pieces, one after the other."""
    pieces = [known[i] for i in completion.token_ids.tolist()]
    said: str = completion.record["text"]
    return said == "".join(p.text for p in pieces if not p.special)


def columns(rollouts: Rollouts, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return the tokens: all of them in "token" and "mu", those that were trained also in the other columns.

    Numbers are codes of `decimals`; pi is what its code is more than that of mu.

    Args:
        rollouts: of a run.
        ids: from `vocabulary`.
    """
    order = np.argsort(ids, kind="stable")
    all_ids = _all(rollouts.completions, lambda c: c.token_ids, np.int64)
    trained = list(rollouts.trained())

    def codes(values: Callable[[Any], NDArray[Any]]) -> decimals.Codes:
        return decimals.encode(_all(trained, values, np.float64))

    mu_trained = codes(lambda cs: cs[0].mu)
    return {
        "length": np.array([len(c.token_ids) for c in rollouts.completions], dtype=np.uint32),
        "token": order[np.searchsorted(ids[order], all_ids)].astype(np.uint32),
        "mu": decimals.encode(_all(rollouts.completions, lambda c: c.mu, np.float64)),
        "pi_above_mu": (codes(lambda cs: cs[1].pi) - mu_trained).astype(np.int16),
        "ratio": codes(lambda cs: cs[1].ratio),
        "prob_diff": codes(lambda cs: cs[1].prob_diff),
        "weight": codes(lambda cs: cs[1].weight),
        "out_of_region": _all(trained, lambda cs: cs[1].out_of_region, np.uint8),
    }


def _all(items: Sequence[Any], column: Callable[[Any], NDArray[Any]], dtype: type) -> NDArray[Any]:
    """One column of all items, end to end."""
    return np.concatenate([np.empty(0, dtype), *(np.asarray(column(i), dtype=dtype) for i in items)])
