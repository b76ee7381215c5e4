"""What a run's folder holds of its warm-up, and what came of it. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from drpo.errors import InputError, counted
from drpo.train.records import METRICS, MODEL, TIMING, Evaluation, Written, read_json, read_records
from drpo.train.stored import SHA256SUMS

WARM_UP, ANSWERS, TALLY, BEFORE = "warm_up", "answers.jsonl", "tally.json", "evaluation.json"
"""The folder in a run's; in it the answers, what came of them, and the evaluation before."""


@dataclass(frozen=True)
class Tally:
    """What came of the answers.

    Args:
        problems: to answer.
        answered: that were answered so far.
        samples: answers to each.
        solved: of those answered, with a right answer.
        right: right answers.
        cut: of these, that were cut at the limit of tokens.
        learnt: answers that are learnt from: right, whole, different, and not too many of a problem.
        reward_mean: mean reward of the answers that have one.
        reward_max: the largest.
        sampled_tokens: of all answers.
        written: of the file of answers, once all are there.
    """

    problems: int
    answered: int
    samples: int
    solved: int
    right: int
    cut: int
    learnt: int
    reward_mean: float
    reward_max: float
    sampled_tokens: int
    written: Written | None = None

    @property
    def complete(self) -> bool:
        """Whether every problem is answered."""
        return self.answered == self.problems

    def __str__(self) -> str:
        """Return one line: how many problems have a right answer, and how many answers are learnt from."""
        so_far = "" if self.complete else f"{self.answered:,} of {self.problems:,} problems answered, "
        solved = f"a right answer to {self.solved:,} of {counted(self.answered, 'problem')}"
        cut = f"; {counted(self.cut, 'right answer')} left out, cut at the limit of tokens" if self.cut else ""
        learnt = f"{counted(self.learnt, 'answer')} to learn from"
        return f"{so_far}{solved}; {learnt}{cut} (mean reward {self.reward_mean:.3g})"


def read_tally(folder: Path) -> Tally | None:
    """Return what came of the answers of a run's warm-up so far; None where there are none.

    Args:
        folder: of the run.

    Raises:
        InputError: tally.json cannot be read.
    """
    path = folder / WARM_UP / TALLY
    try:
        return msgspec.convert(read_json(path), Tally)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.ValidationError as error:
        raise InputError(f"{path} cannot be read: {error}".replace("`", "")) from None


def is_warm(folder: Path) -> bool:
    """Whether the model that a run's RL begins with is written.

    Args:
        folder: of the run.
    """
    return (folder / WARM_UP / MODEL / SHA256SUMS).is_file()


def read_before(folder: Path) -> dict[str, Any] | None:
    """Return the record of the held-out evaluation before a run's warm-up; None where there is none.

    Args:
        folder: of the run.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / WARM_UP / BEFORE
    try:
        record = read_json(path)
        msgspec.convert(record, Evaluation, str_keys=True)
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.ValidationError as error:
        raise InputError(f"{path} cannot be read: {error}".replace("`", "")) from None


def summed_up(folder: Path) -> dict[str, Any] | None:
    """Return what came of a run's warm-up, for summary.json; None where there is none, or no answer yet.

    Args:
        folder: of the run.

    Raises:
        InputError: a file cannot be read.
    """
    tally = read_tally(folder)
    if tally is None:
        return None
    losses = _losses(folder)
    seconds = [v for record in read_records(folder / WARM_UP / TIMING) for k, v in record.items() if k != "step"]
    return {
        **{name: value for name, value in vars(tally).items() if name != "written"},
        "updates": len(losses),
        "nll_first": losses[0] if losses else None,
        "nll_last": losses[-1] if losses else None,
        "seconds": sum(seconds),
        "finished": is_warm(folder),
    }


def outcome(folder: Path) -> str | None:
    """Say in a line how far a run's warm-up is, or what came of it; None where it has none.

    Args:
        folder: of the run.

    Raises:
        InputError: a file cannot be read.
    """
    tally = read_tally(folder)
    if tally is None:
        return None
    losses = _losses(folder)
    if not losses:
        return str(tally)
    done = counted(len(losses), "update")
    return f"{tally}; {done}, loss {losses[0]:.3g} -> {losses[-1]:.3g}{'' if is_warm(folder) else ' so far'}"


def _losses(folder: Path) -> list[float]:
    """The negative log-likelihood per token at each update of the fine-tuning."""
    return [record["nll"] for record in read_records(folder / WARM_UP / METRICS)]
