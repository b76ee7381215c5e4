"""One call of a reward and what came of it; and the settings under which a run calls it."""

import math
import numbers
import time
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from drpo.errors import InputError, nearest
from drpo.rewards.contract import Reward
from drpo.types import Failure, Problem

OnFailure: TypeAlias = Literal["drop", "zero", "error"]
_LONGEST = 200  # letters of a failure's text


@dataclass(frozen=True)
class Marking:
    """How a run has its completions marked: by how many processes, within what bounds, and what a failure costs.

    Args:
        processes: that run the reward, at least 1.
        seconds: wall-clock time that marking one completion may take, above 0.
        memory_gb: GiB of address space that a reward's process may take beyond what it has when it has imported the
            reward; 0 is no limit. Without effect outside Linux.
        on_failure: what becomes of a completion whose reward failed: drop leaves it out of its group, zero gives it a
            score of 0, error ends the run.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> Marking(on_failure="zero").seconds
        10.0
    """

    processes: int = 1
    seconds: float = 10.0
    memory_gb: float = 4.0
    on_failure: OnFailure = "drop"

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise InputError(f"marking.processes={self.processes}: must be at least 1")
        if not 0 < self.seconds < math.inf:
            raise InputError(f"marking.seconds={self.seconds}: must be finite and above 0")
        if not 0 <= self.memory_gb < math.inf:
            raise InputError(f"marking.memory_gb={self.memory_gb}: must be finite and 0 (no limit) or more")
        if self.on_failure not in get_args(OnFailure):
            raise InputError(f"marking.on_failure={self.on_failure!r}{nearest(self.on_failure, get_args(OnFailure))}")


@dataclass(frozen=True)
class Mark:
    """What a reward made of one completion.

    Args:
        score: finite; None where the reward abstained or failed.
        failure: what went wrong; None where nothing did.
        seconds: wall-clock time of the call; the deadline where it timed out, 0 where its process died.
    """

    score: float | None
    failure: Failure | None
    seconds: float


def call(reward: Reward, problem: Problem, text: str) -> Mark:
    """Mark one completion, whatever the reward does short of ending this process.

    Args:
        reward: as `drpo.rewards.contract` says.
        problem: the question.
        text: the completion's.

    Raises:
        KeyboardInterrupt: while the reward ran.
    """
    start = time.perf_counter()
    score: float | None = None
    try:
        score, failure = _read(reward(problem, text))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit too: whatever the reward does, it is the reward's failure
        failure = Failure("raised", one_line(error))
    return Mark(score, failure, time.perf_counter() - start)


def one_line(error: BaseException) -> str:
    """Say an error in one short line."""
    name = type(error).__name__
    try:
        text = " ".join(f"{name}: {error}".split()).removesuffix(":")
    except Exception:  # an error's own __str__ may fail
        text = name
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _read(value: object) -> tuple[float | None, Failure | None]:
    if value is None:
        return None, None
    if not isinstance(value, numbers.Real | np.bool_):
        return None, Failure("not_a_number", f"returned {_shown(value)}; a reward returns one number, or None")
    number = float(value)
    return (number, None) if math.isfinite(number) else (None, Failure("not_finite", f"returned {number}"))


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split())[:60]} ({type(value).__name__})"
