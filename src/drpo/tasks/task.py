"""What a task is: a source of problems, some to train on and others, never the same, to evaluate on."""

from typing import Protocol

from drpo.rewards import Reward
from drpo.types import Problem


class Task(Protocol):
    """A source of problems; both methods are pure functions of their arguments, so a resumed run needs no cursor."""

    @property
    def reward(self) -> Reward:
        """The default way to score it."""
        ...

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw the training problems of one rollout.

        Args:
            n: how many, >= 1.
            step: which rollout of the run, >= 0.
            seed: the run's.

        Returns:
            n problems.

        Raises:
            InputError: the task has none to train on.
        """
        ...

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n evaluation problems, which `sample` never returns.

        Args:
            n: how many, >= 0.

        Returns:
            n problems, or all of them where there are fewer; the same in every run.

        Raises:
            InputError: the task has none at all.
        """
        ...
