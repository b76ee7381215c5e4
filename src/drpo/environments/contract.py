"""What an environment is: one episode of a conversation; and what makes one for a problem."""

from typing import Protocol, TypeGuard

from drpo.tasks import Task
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn


class Environment(Protocol):
    """One episode, used once. It receives text and never tokens to encode: those stay with the episode driver.

    Its answers depend on its problem, its seed and its turns alone, so an episode can be rebuilt in another process.
    Each method may be a coroutine.
    """

    def reset(self) -> Observation:
        """Return what the model reads first."""
        ...

    def step(self, turn: Turn) -> StepResult:
        """Answer a turn of the model."""
        ...

    def close(self) -> None:
        """Release what the episode holds; called once, at its end, however it ended."""
        ...


class EnvironmentMaker(Protocol):
    """Makes the environment of each episode. It is sent to worker processes, so it must be picklable.

    A maker declared with `drpo.rewards.in_process` is called in the trainer's process instead: its environments are
    quick, always return and harm nothing.
    """

    @property
    def max_turns(self) -> int:
        """After so many turns an episode ends."""
        ...

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return an episode's environment.

        Args:
            problem: that the episode is an attempt at.
            seed: of the hidden state; the same for all samples of a problem, so that they can be compared.
        """
        ...


class EnvironmentTask(Task, EnvironmentMaker, Protocol):
    """A task whose problems are solved in several turns, in environments of its own.

    `reward` scores the whole episode besides what its turns earned; `drpo.environments.rewards.turns_say_all` where
    the turns earn it all. Where problems differ in more than their messages, the attribute `hidden_state = True` says
    that `held_out` problems are set aside by the task itself; else those of equal messages count as the same.
    """


def makes_environments(task: Task) -> TypeGuard[EnvironmentTask]:
    """Whether a task has environments of its own."""
    return callable(getattr(task, "open", None))
