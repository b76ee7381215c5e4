"""A model's own answers, sampled for its warm-up: to which problems, in which file, and which are learnt from.

answers.jsonl has a line for each, as rollouts.jsonl has. A process that is killed leaves whole rollouts, and perhaps a
part of one, which the next process cuts off and samples again.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from drpo.errors import InputError
from drpo.files import naming, opened_here, truncate
from drpo.seeds import derive
from drpo.tasks import is_finite, sample_unseen, training_pool
from drpo.train.best_of import MADE_UP, BestOf
from drpo.train.config import Run
from drpo.train.log import sequence_of
from drpo.train.records import Sum, read_line, read_written
from drpo.train.rollout_record import fault, sequences
from drpo.train.setup import Components
from drpo.train.warmed import Tally
from drpo.types import Episode, Problem, RewardResult, Sampling, ScoredGroup

Record = Mapping[str, Any]


def problems_of_rollouts(run: Run, rule: BestOf, components: Components) -> list[list[Problem]]:
    """Return the problems to answer, those of each rollout: all of a finite task, or what an endless one draws.

    Args:
        run: the configuration.
        rule: how many.
        components: built from the configuration.
    """
    task, n = run.data.task, run.data.prompts
    if is_finite(task):
        pool = list(training_pool(task, components.held_out, 0, components.fits).values())
        some = sorted(pool, key=lambda p: derive("warm-up", run.seed, p.id))[: rule.problems]
        problems = some if rule.problems else pool
        return [problems[i : i + n] for i in range(0, len(problems), n)]
    wanted, seed = rule.problems or MADE_UP, derive("warm-up", run.seed)
    sizes = [min(n, wanted - i) for i in range(0, wanted, n)]
    return [sample_unseen(task, components.held_out, k, i, seed, components.fits) for i, k in enumerate(sizes)]


class Selection:
    """Takes answers in, a rollout at a time, and selects those to learn from.

    Args:
        rule: which are right, and how many of a problem are selected.
        problems: to answer in all.

    Attributes:
        learnt: the records that are learnt from, in order.
    """

    def __init__(self, rule: BestOf, problems: int) -> None:
        self.learnt: list[Record] = []
        self._rule, self._problems = rule, problems
        self._known: set[tuple[Any, ...]] = set()
        self._rewards: list[float] = []
        self._answered = self._solved = self._right = self._cut = self._tokens = 0

    def add(self, records: Sequence[Record]) -> None:
        """Take the answers of a rollout, those to a problem together."""
        for _, of_problem in groupby(records, key=lambda record: record["problem"]):
            self._add(list(of_problem))

    def _add(self, records: Sequence[Record]) -> None:
        """Take the answers to a problem."""
        scored = [r for r in records if r["reward"] is not None]
        right = [r for r in scored if r["reward"] >= self._rule.right]
        whole = [r for r in right if r["finish_reason"] != "length"]
        new: dict[tuple[Any, ...], Record] = {}
        for record in whole:
            new.setdefault(_ids(record), record)
        chosen = {ids: new[ids] for ids in [ids for ids in new if ids not in self._known][: self._rule.answers]}
        self._known |= chosen.keys()
        self.learnt += chosen.values()
        self._rewards += [r["reward"] for r in scored]
        self._answered += 1
        self._solved += bool(right)
        self._right += len(right)
        self._cut += len(right) - len(whole)
        self._tokens += sum(len(s["behavior_logp"]) for r in records for s in sequences(r))

    def tally(self, path: Path) -> Tally:
        """Return what came of the answers so far; with the sum of their file, once all are there."""
        complete = self._answered == self._problems
        return Tally(
            problems=self._problems,
            answered=self._answered,
            samples=self._rule.samples,
            solved=self._solved,
            right=self._right,
            cut=self._cut,
            learnt=len(self.learnt),
            reward_mean=sum(self._rewards) / max(1, len(self._rewards)),
            reward_max=max(self._rewards, default=0.0),
            sampled_tokens=self._tokens,
            written=Sum().read(path).record() if complete else None,
        )


def _ids(record: Record) -> tuple[Any, ...]:
    """The ids of an answer, with those of its prompt."""
    return tuple((tuple(s["prompt_ids"]), tuple(s["token_ids"])) for s in sequences(record))


def as_example(record: Record, number: int) -> ScoredGroup:
    """Return an answer as an example of fine-tuning, whose trained tokens are those that were sampled.

    Args:
        record: of the file of answers.
        number: among the examples.
    """
    rows = tuple(sequence_of(row, 0) for row in sequences(record))
    n = sum(row.n_sampled for row in rows)
    prompt, text = record["prompt"], record["text"]
    problem = Problem.of_text(str(number), prompt, record["answer"])
    episode = Episode(problem.id, 0, (), prompt, text, "stop", Sampling(samples=1), (n,), rows)
    return ScoredGroup(problem, (episode,), (RewardResult(1.0),))


# ---- the file ----


def take_recorded(path: Path, wanted: Sequence[Sequence[Problem]], samples: int, selection: Selection) -> int:
    """Take the whole rollouts of a file of answers, cut off what is behind them, and return their number.

    Args:
        path: of the file; it need not exist.
        wanted: the problems of each rollout.
        samples: answers to each.
        selection: takes them.

    Raises:
        InputError: it cannot be read, or its answers are to other problems.
    """
    if not path.exists():
        return 0
    done, end = 0, 0
    sizes = [samples * len(problems) for problems in wanted]
    for problems, (records, behind) in zip(wanted, _whole_rollouts(path, sizes), strict=False):
        if [r["problem"] for r in records] != [p.id for p in problems for _ in range(samples)]:
            raise InputError(
                f"{path}: rollout {done + 1} answers other problems than the task has now; put the data back, or "
                "start anew in another folder"
            )
        selection.add(records)
        done, end = done + 1, behind
    truncate(path, end)
    return done


def _whole_rollouts(path: Path, sizes: Sequence[int]) -> Iterator[tuple[list[Record], int]]:
    """Yield the records of each whole rollout of a file, and the length of the file up to there."""
    with path.open("rb") as lines:
        for step, size in enumerate(sizes, 1):
            records: list[Record] = []
            while len(records) < size:
                line = lines.readline()
                if not line.endswith(b"\n"):
                    return
                records.append(_record(line, step, f"{path}, rollout {step}"))
            yield records, lines.tell()


def _record(line: bytes, step: int, where: str) -> Record:
    record = read_line(line, where)[1]
    wrong = f"an answer of rollout {record['step']}" if record["step"] != step else fault(record)
    if wrong is not None:
        raise InputError(f"{where} cannot be read: {wrong}; start anew in another folder")
    return record


def require_written(path: Path, tally: Tally) -> None:
    """Raise unless a file of answers is what was written, where all answers are there.

    Raises:
        InputError: it is not.
    """
    if tally.written is None:
        return
    try:
        read_written(path, tally.written)
    except InputError as error:
        raise InputError(f"{error}; put it back, or start anew in another folder") from None


def append(path: Path, records: Sequence[Record]) -> None:
    """Append records to a file of answers, and force them to the disk."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with naming(path), open(path, "ab", opener=opened_here) as out:
        out.write(text.encode("utf-8", "replace"))
        out.flush()
        os.fsync(out.fileno())
