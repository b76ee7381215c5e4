"""Tasks whose turns earn everything."""

from drpo.rewards import Reward, in_process
from drpo.types import Problem


@in_process
def turns_say_all(problem: Problem, text: str) -> float:
    """Return 0: the environment's own rewards of turns are all there is."""
    return 0.0


class PaidByTurns:
    """What tasks share whose turns earn everything, and which have a field `turns`: at most so many in an episode."""

    turns: int

    @property
    def reward(self) -> Reward:
        """The turns earn it all."""
        return turns_say_all

    @property
    def max_turns(self) -> int:
        """`turns`."""
        return self.turns
