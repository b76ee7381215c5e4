"""Environments in this process: for those that are quick, always return and harm nothing."""

from collections.abc import Mapping, Sequence

from drpo.environments.contract import EnvironmentMaker
from drpo.environments.host import EpisodeHost
from drpo.seeds import derive
from drpo.types import Failure, Problem
from drpo.types.environment import Observation, StepResult, Turn


class LocalEnvironments:
    """Holds the environments of many episodes in this process; what one raises costs its episode.

    Args:
        maker: opens them.
        seed: of the hidden states.
    """

    def __init__(self, maker: EnvironmentMaker, seed: int = 0) -> None:
        self._maker, self._seed = maker, seed
        self._host = EpisodeHost(maker)

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
        self.close()
        return [self._host.open(n, p, hidden_seed(self._seed, p)) for n, p in enumerate(problems)]

    def step(self, turns: Mapping[int, Turn]) -> dict[int, StepResult | Failure]:
        """Return what each episode's environment answers."""
        return {n: self._host.step(n, turn) for n, turn in turns.items()}

    def close(self) -> None:
        """Close every episode; what that raises is of no more interest."""
        for number in self._host.episodes:
            self._host.close(number)


def hidden_seed(seed: int, problem: Problem) -> int:
    """Return the seed of the hidden state of a problem's episodes."""
    return derive("environment", seed, problem.id)
