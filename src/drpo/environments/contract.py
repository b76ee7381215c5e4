"""What an environment is: one episode of a conversation, and a task that opens it."""

from typing import Protocol

from drpo.tasks import Task
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn


class Environment(Protocol):
    """One episode, used once. It receives text and never tokens to encode: those stay with the episode driver."""

    def reset(self) -> Observation:
        """Return what the model reads first."""
        ...

    def step(self, turn: Turn) -> StepResult:
        """Answer a turn of the model."""
        ...

    def close(self) -> None:
        """Release what the episode holds; called once, at its end, however it ended."""
        ...


class EnvironmentTask(Task, Protocol):
    """A task whose problems are solved in several turns.

    `reward` scores the whole episode besides what its turns earned; `no_reward` where the turns say it all.
    """

    @property
    def max_turns(self) -> int:
        """After so many turns an episode ends."""
        ...

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return an episode's environment.

        Args:
            problem: of `sample` or `held_out`.
            seed: of the hidden state; the same for all samples of a problem, so that they can be compared.
        """
        ...
