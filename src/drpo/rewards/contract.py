"""What a reward is: any callable from a problem and the text of one completion to a score, or to None to abstain."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from drpo.types import Problem

Reward: TypeAlias = Callable[[Problem, str], float | None]
AnyReward = TypeVar("AnyReward", bound=Reward)


def in_process(reward: AnyReward) -> AnyReward:
    """Declare that a reward is quick, always returns and harms nothing, so that the pool calls it where it stands.

    Args:
        reward: a function, or an instance whose class allows attributes.

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
