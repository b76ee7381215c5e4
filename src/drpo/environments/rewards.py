"""The reward of tasks whose turns earn everything."""

from drpo.rewards import in_process
from drpo.types import Problem


@in_process
def turns_say_all(problem: Problem, text: str) -> float:
    """Return 0: the environment's own rewards of turns are all there is."""
    return 0.0
