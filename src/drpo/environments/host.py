"""Calls the environments of episodes, in whichever process."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from drpo.environments.answers import checked_observation, checked_result
from drpo.environments.contract import Environment, EnvironmentMaker
from drpo.errors import describe
from drpo.types import Failure, Problem
from drpo.types.environment import Observation, StepResult, Turn

T = TypeVar("T")


class EpisodeHost:
    """Holds the environments of episodes. An error of one, or an answer that is none, becomes a `Failure`.

    Args:
        maker: opens the environments. Their coroutines run in one event loop, which lasts until all are closed.
    """

    def __init__(self, maker: EnvironmentMaker) -> None:
        self._maker = maker
        self._environments: dict[int, Environment] = {}
        self._loop: asyncio.Runner | None = None

    @property
    def episodes(self) -> tuple[int, ...]:
        """The numbers of those that are open."""
        return tuple(self._environments)

    def open(self, number: int, problem: Problem, seed: int) -> Observation | Failure:
        """Open an episode under a number; see `EnvironmentMaker.open` and `Environment.reset`."""

        def opened() -> Observation | Failure:
            self._environments[number] = self._maker.open(problem, seed)
            return checked_observation(self._settled(self._environments[number].reset()))

        return _caught(opened)

    def step(self, number: int, turn: Turn) -> StepResult | Failure:
        """Return what an episode answers to a turn."""
        return _caught(lambda: checked_result(self._settled(self._environments[number].step(turn))))

    def close(self, number: int) -> None:
        """Close an episode, if it is open; what that raises is of no more interest."""
        environment: Any = self._environments.pop(number, None)
        if environment is not None:
            _caught(lambda: self._settled(environment.close()))
        if self._loop is not None and not self._environments:
            self._loop.close()
            self._loop = None

    def _settled(self, value: Any) -> Any:
        """Return a method's value, after waiting for it where the method is a coroutine."""
        if not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = asyncio.Runner()
        return self._loop.run(_awaited(value))


async def _awaited(value: Awaitable[T]) -> T:
    return await value


def _caught(call: Callable[[], T]) -> T | Failure:
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit too
        return Failure("raised", describe(error))
