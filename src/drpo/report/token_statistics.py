"""The tokens of a run as its updates saw them: rollouts.jsonl and the objective, put together again."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain, groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from drpo.objectives import REGISTRY, Objective, gradient_weight, out_of_region, prob_diff, ratio, reads_batch
from drpo.spec import parse_spec, runs_code
from drpo.train.chapters import read_chapters, value_at
from drpo.train.records import METRICS, ROLLOUTS, read_lines, read_records
from drpo.train.rollout_record import (
    TrainedRow,
    sampled_ids,
    sequences,
    token_advantages,
    token_scores,
    trained_rows,
    unit_numbers,
)
from drpo.types import Tokens

State = Literal["trained", "skipped", "unscored", "unknown"]
PER_TOKEN = (
    "prompt_ids",
    "token_ids",
    "sampled",
    "behavior_logp",
    "logp",
    "divergence",
    "proximal_logp",
    "reference_logp",
    "advantages",
    "reward_penalties",
)


_LEFT_OUT = frozenset((*PER_TOKEN, "branches"))


@dataclass(frozen=True, eq=False, slots=True)
class TokenStatistics:
    """What updates saw of the T trained tokens of one completion; every array has shape [T].

    Args:
        pi: the policy's probability before the update, float64.
        ratio: r = pi / mu, as the objective computes it (capped at e^20).
        prob_diff: D = pi - mu.
        weight: the gradient weight w.
        advantage: of the completion, or of each token where a critic gave it.
        out_of_region: bool; True where the policy has left the objective's region.
    """

    pi: NDArray[np.float64]
    ratio: NDArray[np.float32]
    prob_diff: NDArray[np.float32]
    weight: NDArray[np.float32]
    advantage: NDArray[np.float32]
    out_of_region: NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """A completion of a run; its arrays are parts of those of its step.

    Args:
        record: its record of rollouts.jsonl, without what is one per token.
        token_ids: [N] int64; the sampled tokens of all its turns.
        mu: [N] float64; the sampler's probability of each token.
        trained: [N] bool; True for the T tokens that an update saw.
        lengths: of each of its sequences, how many of the N.
        state: "trained" where it went through the model; "skipped" where its advantage, and so its gradient, is 0;
            "unscored" where it has no reward; "unknown" where a dump does not have the policy's probabilities.
        statistics: what the updates saw, where it is "trained".
    """

    record: Mapping[str, Any]
    token_ids: NDArray[np.int64]
    mu: NDArray[np.float64]
    trained: NDArray[np.bool_]
    lengths: tuple[int, ...]
    state: State
    statistics: TokenStatistics | None


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The completions of a run, or a share of its groups.

    Args:
        completions: in the order of the file.
        n_all: how many the run has.
    """

    completions: tuple[Sampled, ...]
    n_all: int

    def trained(self) -> Iterator[tuple[Sampled, TokenStatistics]]:
        """The completions that an update saw, and what it saw."""
        return ((c, c.statistics) for c in self.completions if c.statistics is not None)


def read_rollouts(folder: Path, objective: Objective, most_tokens: int, sequence: str = "episode") -> Rollouts:
    """Read the completions of a run and ask its objective about the tokens of every update.

    Args:
        folder: of the run.
        objective: the run's; it is asked update by update, as the trainer did. Where it was changed, that of the step.
        most_tokens: where the run has more, a share of its groups is read that has about so many: the same ones
            every time.
        sequence: what the objective took as one sequence, "episode" or "turn".
    """
    chapters = read_chapters(folder)
    n_tokens = sum(m.get("sampled_tokens", 0) for m in read_records(folder / METRICS))
    share = min(1.0, most_tokens / max(1, n_tokens))
    path, n_all = folder / ROLLOUTS, 0
    found: list[Sampled] = []
    lines = read_lines(path) if path.exists() else iter(())
    for step, of_step in groupby((record for _, record in lines), key=lambda r: r["step"]):
        records = list(of_step)
        n_all += len(records)
        spec = value_at(chapters, "objective", step, None)  # None: it is the present one
        if spec is not None and runs_code(spec):  # code that a folder names is not imported; its steps are left out
            continue
        asked_of = objective if spec is None else parse_spec(spec, REGISTRY)
        unit = value_at(chapters, "sequence", step, sequence)
        found += of_one_step([r for r in records if _lot(r["step"], r["problem"]) < share], asked_of, unit)
    return Rollouts(tuple(found), n_all)


def _lot(step: int, problem: str) -> float:
    """In [0, 1), from the step and the problem alone: a group is read whole or not at all."""
    return zlib.crc32(f"{step}/{problem}".encode("utf-8", "surrogatepass")) / 2**32


def of_one_step(records: Sequence[Mapping[str, Any]], objective: Objective, sequence: str = "episode") -> list[Sampled]:
    """Return the completions of a step, in order.

    Args:
        records: of rollouts.jsonl; those of one update must all be there where the objective is not token-wise.
        objective: the run's.
        sequence: what it took as one sequence, "episode" or "turn".
    """
    statistics: dict[int, list[TokenStatistics]] = {}
    for rows in _asked_together(trained_rows(records, sequence), objective):
        for row, seen in zip(rows, asked(rows, objective), strict=True):
            statistics.setdefault(row.episode, []).append(seen)
    own = [sequences(record) for record in records]
    lengths = [[len(s["behavior_logp"]) for s in of_one] for of_one in own]
    every = [s for of_one in own for s in of_one]
    token_ids = np.fromiter(chain.from_iterable(map(sampled_ids, every)), np.int64)
    mu = np.exp(np.fromiter(chain.from_iterable(s["behavior_logp"] for s in every), np.float64))
    trained = np.repeat(np.array(["logp" in s for s in every], dtype=bool), [n for of_one in lengths for n in of_one])
    return [
        Sampled(
            record={name: value for name, value in record.items() if name not in _LEFT_OUT},
            token_ids=token_ids[span],
            mu=mu[span],
            trained=trained[span],
            lengths=tuple(of_one),
            state="trained" if i in statistics else "unscored" if record.get("reward") is None else "skipped",
            statistics=_joined(statistics[i]) if i in statistics else None,
        )
        for i, (record, of_one, span) in enumerate(zip(records, lengths, _spans(map(sum, lengths)), strict=True))
    ]


def _asked_together(rows: Sequence[TrainedRow], objective: Objective) -> list[list[TrainedRow]]:
    """Those of each update; all at once where the objective asks each token alone."""
    if objective.tokenwise and not reads_batch(objective):
        return [list(rows)] if rows else []
    updates = sorted({row.tokens["update"] for row in rows})
    return [[row for row in rows if row.tokens["update"] == update] for update in updates]


def _spans(lengths: Iterable[int]) -> list[slice]:
    """Where each of some parts lies, one after the other."""
    return [slice(first, behind) for first, behind in pairwise(accumulate(lengths, initial=0))]


def _joined(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    if len(parts) == 1:
        return parts[0]
    return TokenStatistics(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(TokenStatistics)))


def asked(rows: Sequence[TrainedRow], objective: Objective) -> list[TokenStatistics]:
    """Return what the objective says of each row of one update.

    Args:
        rows: all of the same update, or of several where it asks each token alone.
        objective: the run's.
    """
    tokens = tokens_of(rows)
    weight = gradient_weight(objective, tokens)
    left = out_of_region(objective, tokens)
    left = torch.zeros_like(tokens.keep) if left is None else left
    pi = tokens.logp.double().exp()
    columns = [c.numpy() for c in (pi, ratio(tokens), prob_diff(tokens), weight, tokens.advantage, left)]
    return [TokenStatistics(*(c[span] for c in columns)) for span in _spans(len(r.units) for r in rows)]


def tokens_of(rows: Sequence[TrainedRow]) -> Tokens:
    """Return the sampled tokens of some rows, in order."""

    def column(name: str) -> torch.Tensor:
        return _float32(chain.from_iterable(r.tokens[name] for r in rows))

    sequence = torch.tensor(unit_numbers(rows), dtype=torch.int64)
    scores = token_scores(rows)
    return Tokens(
        logp=column("logp"),
        behavior_logp=column("behavior_logp"),
        advantage=_float32(chain.from_iterable(token_advantages(r.tokens) for r in rows)),
        keep=torch.ones_like(sequence, dtype=torch.bool),
        sequence=sequence,
        divergence=column("divergence") if "divergence" in rows[0].tokens else None,
        proximal_logp=column("proximal_logp") if "proximal_logp" in rows[0].tokens else None,
        reference_logp=column("reference_logp") if "reference_logp" in rows[0].tokens else None,
        score=None if scores is None else _float32(scores),
    )


def _float32(numbers: Iterable[float]) -> torch.Tensor:
    with np.errstate(over="raise"):
        return torch.from_numpy(np.fromiter(numbers, np.float64).astype(np.float32))
