"""The interface of a task: a source of problems to train on, and of different ones to evaluate on."""

from typing import Protocol, TypeGuard

from drpo.rewards import Reward
from drpo.types import Problem


class Task(Protocol):
    """A source of problems; both methods are pure functions of their arguments, so a resumed run needs no cursor."""

    @property
    def reward(self) -> Reward:
        """The default reward."""
        ...

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw the training problems of one rollout.

        Args:
            n: number of problems, >= 1.
            step: index of the rollout, >= 0.
            seed: the run's seed.

        Returns:
            n problems.

        Raises:
            InputError: the task has no training problems.
        """
        ...

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n evaluation problems, which `sample` never returns.

        Args:
            n: number of problems, >= 0.

        Returns:
            n problems, or all if there are fewer; the same in every run.

        Raises:
            InputError: the task has no evaluation problems.
        """
        ...


class FiniteTask(Task, Protocol):
    """A task with a finite set of problems to train on."""

    def training_problems(self) -> list[Problem]:
        """Return all of them, in a fixed order; the id of each is unique and the same in every run."""
        ...


def is_finite(task: Task) -> TypeGuard[FiniteTask]:
    """Whether a task has a finite set of problems to train on."""
    return callable(getattr(task, "training_problems", None))
