"""The interface of a reward: a callable from a problem and a transcript, or a text, to a score."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from drpo.types import Failure, FailureKind, Problem, RewardResult, Transcript

Score: TypeAlias = float | RewardResult | None
Reward: TypeAlias = (
    Callable[[Problem, Transcript], Score | Awaitable[Score]] | Callable[[Problem, str], Score | Awaitable[Score]]
)
"""Returns a finite number, a `RewardResult`, or None to abstain; an `async def` is awaited. See `reads_transcript` for
its argument."""

Declared = TypeVar("Declared")

CONCURRENCY = 32
"""Calls of an async reward that are awaited at once in a process, unless its attribute `concurrency` says otherwise."""


class ScoreError(Exception):
    """A reward has no score, and knows which kind of failure that is.

    Args:
        kind: see `FailureKind`.
        text: what happened, one line.
    """

    def __init__(self, kind: FailureKind, text: str) -> None:
        super().__init__(text)
        self.failure = Failure(kind, text)


def is_async(reward: object) -> bool:
    """Whether calls of a reward are awaited: it, or its class's `__call__`, is `async def`, or `is_async` is true.

    Example:
        >>> async def remote(problem, text):
        ...     return 1.0
        >>> is_async(remote), is_async(lambda problem, text: 1.0)
        (True, False)
    """
    declared = bool(getattr(reward, "is_async", False))
    return declared or any(map(inspect.iscoroutinefunction, (reward, getattr(type(reward), "__call__", None))))  # noqa: B004


def is_graded(reward: object) -> bool:
    """Whether a reward grades, so that a right answer may score below 1: its attribute `graded` is true."""
    return bool(getattr(reward, "graded", False))


def concurrency(reward: object) -> int:
    """Return how many calls of an async reward are awaited at once in a process: its `concurrency`, or 32."""
    number: Any = getattr(reward, "concurrency", CONCURRENCY)
    return max(1, int(number))


def reads_transcript(reward: Reward) -> bool:
    """Whether a reward receives the transcript: its second parameter is named `transcript` or annotated `Transcript`.

    Every other reward receives the text of the episode's last turn.

    Example:
        >>> def brief(problem, transcript):
        ...     return float(transcript.n_tokens < 100)
        >>> reads_transcript(brief), reads_transcript(lambda problem, text: 1.0)
        (True, False)
    """
    try:
        parameters = list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):  # built in, without a signature
        return False
    if len(parameters) < 2:
        return False
    annotation = parameters[1].annotation
    annotated = annotation.rpartition(".")[2] == "Transcript" if isinstance(annotation, str) else False
    return parameters[1].name == "transcript" or annotated or annotation is Transcript


def name_of(reward: object) -> str:
    """Return a reward's name for messages, or that of other code of the user: module:name, or its repr."""
    module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", None)
    return f"{module}:{name}" if module and name else repr(reward)


def in_process(reward: Declared) -> Declared:
    """Declare that a reward is fast, safe and always returns, so the pool calls it in the trainer's own process.

    The same holds for what opens environments (`drpo.environments`).

    Args:
        reward: a function, a class, or an instance whose class allows attributes.

    Returns:
        The same reward, with the attribute `in_process` set to True.

    Example:
        >>> @in_process
        ... def brevity(problem, text):
        ...     return 1.0 if len(text) < 100 else 0.0
        >>> brevity.in_process
        True
    """
    reward.in_process = True  # type: ignore[attr-defined]
    return reward
