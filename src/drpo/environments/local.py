"""Environments in this process: for those that are quick, always return and harm nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from drpo.environments.contract import Environment, EnvironmentTask
from drpo.rewards.scoring import one_line
from drpo.seeds import derive
from drpo.types import Failure, Problem
from drpo.types.environment import Observation, StepResult, Turn

T = TypeVar("T")


class LocalEnvironments:
    """Holds the environments of many episodes in this process; what one raises costs its episode.

    Args:
        task: opens them.
        seed: of the hidden states.
    """

    def __init__(self, task: EnvironmentTask, seed: int = 0) -> None:
        self._task, self._seed = task, seed
        self._open: dict[int, Environment] = {}

    @property
    def max_turns(self) -> int:
        """The task's."""
        return self._task.max_turns

    def open(self, problems: Sequence[Problem]) -> list[Observation | Failure]:
        """Open an episode for each problem; the hidden state is a function of the seed and the problem's id."""
        return [_safely(lambda n=n, p=p: self._opened(n, p)) for n, p in enumerate(problems)]  # type: ignore[misc]

    def _opened(self, number: int, problem: Problem) -> Observation:
        self._open[number] = self._task.open(problem, derive("environment", self._seed, problem.id))
        return self._open[number].reset()

    def step(self, turns: Mapping[int, Turn]) -> dict[int, StepResult | Failure]:
        """Return what each episode's environment answers."""
        return {n: _safely(lambda n=n, turn=turn: self._open[n].step(turn)) for n, turn in turns.items()}  # type: ignore[misc]

    def close(self) -> None:
        """Close every episode; what that raises is of no more interest."""
        for environment in self._open.values():
            _safely(environment.close)
        self._open.clear()


def _safely(call: Callable[[], T]) -> T | Failure:
    try:
        return call()
    except Exception as error:
        return Failure("raised", one_line(error))
