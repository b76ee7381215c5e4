"""The tokens of a run as its updates saw them: rollouts.jsonl and the objective, put together again."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, groupby
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
"""Fields of a record, or of a sequence, that have a value for each token."""
_LEFT_OUT = frozenset((*PER_TOKEN, "branches"))
_REQUIRED = ("prompt", "answer", "text")


@dataclass(frozen=True, eq=False, slots=True)
class TokenStatistics:
    """What updates saw of T trained tokens; every array has shape [T].

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

    @staticmethod
    def cat(parts: Iterable["TokenStatistics"]) -> "TokenStatistics":
        """Return the statistics of some tokens, and of those after them."""
        columns = zip(*(map(part._column, _COLUMNS) for part in (_NO_TOKENS, *parts)), strict=True)
        return TokenStatistics(*map(np.concatenate, columns))

    def at(self, tokens: NDArray[np.int64]) -> "TokenStatistics":
        """Return the statistics of these tokens."""
        return TokenStatistics(*(self._column(name)[tokens] for name in _COLUMNS))

    def _column(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = getattr(self, name)
        return column


_COLUMNS = tuple(field.name for field in fields(TokenStatistics))
_NONE = np.empty(0, np.float32)
_NO_TOKENS = TokenStatistics(np.empty(0), _NONE, _NONE, _NONE, _NONE, np.empty(0, bool))


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The n completions of a run, or of a share of its groups, in the order of the file, column by column.

    Args:
        fields: of their records of rollouts.jsonl, without what is one per token: name -> of each completion its value,
            None where its record has none.
        states: of each "trained" where it went through the model; "skipped" where its advantage, and so its gradient,
            is 0; "unscored" where it has no reward; "unknown" where a dump does not have the policy's probabilities.
        lengths: of each the number of sampled tokens of each of its sequences.
        token_ids: [N] int64; the sampled tokens of all turns of the first completion, then of the next.
        mu: [N] float64; the sampler's probability of each token.
        trained: [N] bool; True for the T tokens that an update saw.
        statistics: what the updates saw of these.
        n_all: how many completions the run has.
    """

    fields: Mapping[str, Sequence[Any]]
    states: Sequence[State]
    lengths: Sequence[tuple[int, ...]]
    token_ids: NDArray[np.int64]
    mu: NDArray[np.float64]
    trained: NDArray[np.bool_]
    statistics: TokenStatistics
    n_all: int

    @staticmethod
    def cat(parts: Sequence["Rollouts"], n_all: int) -> "Rollouts":
        """Return the completions of some steps as those of a run that has so many."""
        names = dict.fromkeys([*_REQUIRED, *chain.from_iterable(part.fields for part in parts)])
        return Rollouts(
            fields={
                name: [*chain.from_iterable(part.fields.get(name, (None,) * len(part)) for part in parts)]
                for name in names
            },
            states=[*chain.from_iterable(part.states for part in parts)],
            lengths=[*chain.from_iterable(part.lengths for part in parts)],
            token_ids=np.concatenate([np.empty(0, np.int64), *(part.token_ids for part in parts)]),
            mu=np.concatenate([np.empty(0), *(part.mu for part in parts)]),
            trained=np.concatenate([np.empty(0, bool), *(part.trained for part in parts)]),
            statistics=TokenStatistics.cat(part.statistics for part in parts),
            n_all=n_all,
        )

    def __len__(self) -> int:
        """n."""
        return len(self.states)

    def record(self, i: int) -> dict[str, Any]:
        """Return what the record of a completion has."""
        return {name: column[i] for name, column in self.fields.items() if column[i] is not None}

    def ends(self) -> NDArray[np.int64]:
        """Return [n + 1]: where the tokens of each completion begin, and where those of the last one end."""
        return np.cumsum([0, *map(sum, self.lengths)])

    def n_trained(self) -> NDArray[np.int64]:
        """Return [n]: how many tokens of each completion an update saw."""
        return np.diff(np.concatenate([[0], np.cumsum(self.trained)])[self.ends()])


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
    steps: list[Rollouts] = []
    lines = read_lines(path) if path.exists() else iter(())
    for step, of_step in groupby((record for _, record in lines), key=lambda r: r["step"]):
        records = list(of_step)
        n_all += len(records)
        spec = value_at(chapters, "objective", step, None)  # None: it is the present one
        if spec is not None and runs_code(spec):  # code that a folder names is not imported; its steps are left out
            continue
        asked_of = objective if spec is None else parse_spec(spec, REGISTRY)
        unit = value_at(chapters, "sequence", step, sequence)
        steps.append(of_one_step([r for r in records if _lot(r["step"], r["problem"]) < share], asked_of, unit))
    return Rollouts.cat(steps, n_all)


def _lot(step: int, problem: str) -> float:
    """In [0, 1), from the step and the problem alone: a group is read whole or not at all."""
    return zlib.crc32(f"{step}/{problem}".encode("utf-8", "surrogatepass")) / 2**32


def of_one_step(records: Sequence[Mapping[str, Any]], objective: Objective, sequence: str = "episode") -> Rollouts:
    """Return the completions of a step, in order.

    Args:
        records: of rollouts.jsonl; those of one update must all be there where the objective is not token-wise.
        objective: the run's.
        sequence: what it took as one sequence, "episode" or "turn".
    """
    rows = trained_rows(records, sequence)
    seen = {row.episode for row in rows}
    own = [sequences(record) for record in records]
    lengths = [tuple(len(s["behavior_logp"]) for s in of_one) for of_one in own]
    every = [s for of_one in own for s in of_one]
    names = dict.fromkeys([*_REQUIRED, *(name for r in records for name in r if name not in _LEFT_OUT)])
    return Rollouts(
        fields={name: [r[name] if name in _REQUIRED else r.get(name) for r in records] for name in names},
        states=[
            "trained" if i in seen else "unscored" if record.get("reward") is None else "skipped"
            for i, record in enumerate(records)
        ],
        lengths=lengths,
        token_ids=np.fromiter(chain.from_iterable(map(sampled_ids, every)), np.int64),
        mu=np.exp(np.fromiter(chain.from_iterable(s["behavior_logp"] for s in every), np.float64)),
        trained=np.repeat(np.array(["logp" in s for s in every], dtype=bool), [*chain.from_iterable(lengths)]),
        statistics=_statistics(rows, objective),
        n_all=len(records),
    )


def _statistics(rows: Sequence[TrainedRow], objective: Objective) -> TokenStatistics:
    """Return what the objective says of the tokens of some rows, in order."""
    together = _asked_together(rows, objective)
    statistics = TokenStatistics.cat(asked([rows[i] for i in numbers], objective) for numbers in together)
    order = np.array([*chain.from_iterable(together)], dtype=np.int64)
    return statistics.at(np.repeat(order, [len(rows[i].units) for i in order]).argsort(kind="stable"))


def _asked_together(rows: Sequence[TrainedRow], objective: Objective) -> list[list[int]]:
    """The numbers of the rows of each update; of all at once where the objective asks each token alone."""
    alone = objective.tokenwise and not reads_batch(objective)
    together: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        together.setdefault(0 if alone else row.tokens["update"], []).append(i)
    return list(together.values())


def asked(rows: Sequence[TrainedRow], objective: Objective) -> TokenStatistics:
    """Return what the objective says of the tokens of some rows, in order.

    Args:
        rows: all of the same update, or of several where it asks each token alone.
        objective: the run's.
    """
    tokens = tokens_of(rows)
    weight = gradient_weight(objective, tokens)
    left = out_of_region(objective, tokens)
    left = torch.zeros_like(tokens.keep) if left is None else left
    pi = tokens.logp.double().exp()
    columns = (pi, ratio(tokens), prob_diff(tokens), weight, tokens.advantage, left)
    return TokenStatistics(*(column.numpy() for column in columns))


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
