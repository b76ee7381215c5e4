"""Environments in this process: for those that are quick, always return and harm nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from drpo.environments.contract import Environment, EnvironmentMaker
from drpo.rewards.scoring import one_line
from drpo.seeds import derive
from drpo.types import Failure, Problem
from drpo.types.environment import Observation, StepResult, Turn

T = TypeVar("T")


class LocalEnvironments:
    """Holds the environments of many episodes in this process; what one raises costs its episode.

    Args:
        maker: opens them.
        seed: of the hidden states.
    """

    def __init__(self, maker: EnvironmentMaker, seed: int = 0) -> None:
        self._maker, self._seed = maker, seed
        self._open: dict[int, Environment] = {}

    def __enter__(self) -> "LocalEnvironments":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_turns(self) -> int:
        """The maker's."""
        return self._maker.max_turns

    def open(self, problems: Sequence[Problem]) -> list[Observation | Failure]:
        """Open an episode for each problem; the hidden state is a function of the seed and the problem's id."""
        return [_safely(lambda n=n, p=p: self._opened(n, p)) for n, p in enumerate(problems)]  # type: ignore[misc]

    def _opened(self, number: int, problem: Problem) -> Observation:
        self._open[number] = self._maker.open(problem, derive("environment", self._seed, problem.id))
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
