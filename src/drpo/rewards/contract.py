"""The interface of a reward: a callable from a problem and a transcript, or a text, to a score."""

import inspect
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from drpo.types import Problem, RewardResult, Transcript

Reward: TypeAlias = (
    Callable[[Problem, Transcript], float | RewardResult | None] | Callable[[Problem, str], float | RewardResult | None]
)
"""Returns a finite number, a `RewardResult`, or None to abstain. See `reads_transcript` for its argument."""

Declared = TypeVar("Declared")


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
