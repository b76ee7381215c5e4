"""The settings of a reward pool, and the result of one call of a reward."""

import asyncio
import numbers
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from drpo.errors import InputError, describe, nearest
from drpo.rewards.contract import Reward, ScoreError, concurrency, name_of
from drpo.rewards.usage import counted
from drpo.types import Failure, Problem, RewardResult, Transcript
from drpo.types.problem import is_reward, not_a_reward
from drpo.workers.limits import require_limits

OnFailure: TypeAlias = Literal["drop", "zero", "error"]
_EXPECTED = "one number, a RewardResult, or None"


@dataclass(frozen=True)
class RewardConfig:
    """How a run scores its episodes: processes, limits, and the cost of a failure.

    Args:
        processes: processes that run the reward, at least 1.
        seconds: the wall-clock limit for scoring one episode, above 0.
        memory_gb: the limit, in GiB, on the address space that a process allocates after it has imported the reward; 0
            is no limit. No effect outside Linux.
        on_failure: what happens to a completion whose reward failed: drop removes it from its group, zero scores it 0,
            error ends the run.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> RewardConfig(on_failure="zero").seconds
        10.0
    """

    processes: int = 1
    seconds: float = 10.0
    memory_gb: float = 4.0
    on_failure: OnFailure = "drop"

    def __post_init__(self) -> None:
        require_limits("reward_pool", self.processes, self.seconds, self.memory_gb)
        if self.on_failure not in get_args(OnFailure):
            raise InputError(
                f"reward_pool.on_failure={self.on_failure!r}{nearest(self.on_failure, get_args(OnFailure))}"
            )


@dataclass(frozen=True)
class Scored:
    """The result of one call of a reward.

    Args:
        result: finite numbers; None if the reward abstained or failed.
        failure: what went wrong, or None.
        seconds: wall-clock time of the call; the deadline if it timed out, 0 if its process died.
        usage: what it asked of an endpoint, by name of the metric (`drpo.rewards.usage`); empty where it asked none.
    """

    result: RewardResult | None
    failure: Failure | None
    seconds: float
    usage: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The result's total."""
        return None if self.result is None else self.result.total


Item: TypeAlias = tuple[Problem, str | Transcript]
"""A problem, and the text or the transcript, as the reward expects."""


def call(reward: Reward, problem: Problem, answer: str | Transcript) -> Scored:
    """Score one completion; an exception of the reward becomes a `Failure`.

    Args:
        reward: see `drpo.rewards.contract`; not async.
        problem: the question.
        answer: the text or the transcript, as the reward expects.

    Raises:
        KeyboardInterrupt: while the reward ran.
    """
    start = time.perf_counter()
    anything: Any = reward
    with counted() as usage:
        try:
            result, failure = _checked(reward, anything(problem, answer), answer)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit too
            result, failure = None, _failure_of(error)
    return Scored(result, failure, time.perf_counter() - start, dict(usage))


def call_batch(reward: Any, items: Sequence[Item]) -> list[Scored]:
    """Score completions with a reward that takes all at once: `score_all(items)` returns a score, or an error, of each.

    An exception of `score_all` is the failure of all.
    """
    start = time.perf_counter()
    values: Sequence[Any]
    try:
        values = list(reward.score_all(items))
        if len(values) != len(items):
            raise ValueError(f"{len(values)} scores of {len(items)} completions")
    except Exception as error:
        values = [error] * len(items)
    seconds = (time.perf_counter() - start) / max(1, len(items))
    return [Scored(*_outcome(reward, value, answer), seconds) for value, (_, answer) in zip(values, items, strict=True)]


def _outcome(reward: Reward, value: Any, answer: str | Transcript) -> tuple[RewardResult | None, Failure | None]:
    return (None, _failure_of(value)) if isinstance(value, Exception) else _checked(reward, value, answer)


async def call_all(reward: Reward, items: Sequence[Item], seconds: float) -> list[Scored]:
    """Score completions with an async reward, as many at once as its `concurrency` says.

    Args:
        reward: whose calls are awaited.
        items: problems and answers.
        seconds: limit of each call, from when it begins; a call that is late is cancelled.
    """
    limit = asyncio.Semaphore(concurrency(reward))

    async def one(problem: Problem, answer: str | Transcript) -> Scored:
        async with limit:
            return await _call_async(reward, problem, answer, seconds)

    return list(await asyncio.gather(*(one(problem, answer) for problem, answer in items)))


async def _call_async(reward: Reward, problem: Problem, answer: str | Transcript, seconds: float) -> Scored:
    start = time.perf_counter()
    anything: Any = reward
    with counted() as usage:
        try:
            async with asyncio.timeout(seconds) as limit:
                value = await anything(problem, answer)
            result, failure = _checked(reward, value, answer)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            late = isinstance(error, TimeoutError) and limit.expired()
            failure = Failure("timed_out", f"timed out after {seconds:g} s") if late else _failure_of(error)
            result = None
    return Scored(result, failure, time.perf_counter() - start, dict(usage))


def _checked(reward: Reward, value: Any, answer: str | Transcript) -> tuple[RewardResult | None, Failure | None]:
    """Convert what a reward returned for an answer to a result that fits it, or to a failure."""
    result, failure = _read(value)
    wrong = None if result is None else _misfit(result, answer)
    if wrong is not None:
        return None, Failure("not_a_number", f"{name_of(reward)} returned {wrong}")
    return result, failure


def _failure_of(error: BaseException) -> Failure:
    return error.failure if isinstance(error, ScoreError) else Failure("raised", describe(error))


def _read(value: Any) -> tuple[RewardResult | None, Failure | None]:
    """Convert a reward's return value to a result of finite floats."""
    if value is None:
        return None, None
    result: Any = value if isinstance(value, RewardResult) else RewardResult(value)
    mappings = isinstance(result.parts, Mapping) and isinstance(result.weights, Mapping)
    if not (mappings and isinstance(result.turns, tuple)):
        rule = "parts and weights must be mappings, turns a tuple"
        return None, Failure("not_a_number", f"returned {_shown(value)}; {rule}")
    if unknown := [name for name in result.weights if name not in result.parts]:
        return None, Failure("not_a_number", f"returned a weight of {unknown[0]!r}, which is none of its parts")
    of_turns = [number for turn in result.turns for number in (turn if isinstance(turn, tuple) else (turn,))]
    for number in (result.total, *result.parts.values(), *result.weights.values(), *of_turns):
        if not isinstance(number, numbers.Real | np.bool_):
            return None, Failure("not_a_number", f"returned {_shown(number)}; a reward returns {_EXPECTED}")
        if not is_reward(float(number)):
            return None, Failure("not_finite", f"returned {not_a_reward(float(number))}")
    return RewardResult.of_floats(result.total, result.parts, result.turns, result.weights), None


def _misfit(result: RewardResult, answer: str | Transcript) -> str | None:
    """Return why a result's per-turn rewards do not fit the episode, or None."""
    n_rewards = len(result.turns)
    if n_rewards and not isinstance(answer, Transcript):
        return f"rewards of {n_rewards} turns, but it reads the text alone, not the transcript"
    turns = answer.turns if isinstance(answer, Transcript) else ()
    if n_rewards and n_rewards != len(turns):
        return f"rewards of {n_rewards} turns, but the episode has {len(turns)}"
    for i, (rewards, n_tokens) in enumerate(zip(result.turns, turns, strict=False)):
        if isinstance(rewards, tuple) and len(rewards) != n_tokens:
            return f"{len(rewards)} rewards of tokens for turn {i}, which has {n_tokens} sampled tokens"
    return None


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split())[:60]} ({type(value).__name__})"
