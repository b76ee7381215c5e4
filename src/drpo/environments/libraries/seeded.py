"""What tasks share whose problems are seeds: each seed is a game, and evaluation has seeds of its own."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from drpo.environments.contract import Environment
from drpo.environments.libraries.imports import made_anew, require_turns
from drpo.environments.rewards import PaidByTurns
from drpo.errors import InputError, one_line
from drpo.seeds import derive
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import message

T = TypeVar("T")
_SEEDS = 2**30
HELD_OUT = 512
"""Games that evaluation has at most."""


@dataclass(frozen=True)
class Answer:
    """What a game answers to a turn.

    Args:
        text: what the model reads next.
        reward: of the turn.
        done: the game is over.
        failed: the turn could not be read as an action.
    """

    text: str
    reward: float
    done: bool
    failed: bool = False


class Game(Protocol):
    """A game in text."""

    def reset(self, seed: int) -> str:
        """Start the game of a seed and return what the player reads first."""
        ...

    def step(self, action: str) -> Answer:
        """Answer the player's action."""
        ...

    def close(self) -> None:
        """Release what the game holds."""
        ...


class Randomness:
    """The global random numbers of `random` and numpy as one episode sees them, whatever else draws from them.

    Games draw from the generators that the whole process shares. So that an episode is a function of its seed and its
    turns alone, each has a state of these generators of its own, in force while the game runs.

    Args:
        seed: of the state.

    Example:
        >>> def draw(randomness):
        ...     with randomness.in_force():
        ...         return random.random()
        >>> one, same = Randomness(3), Randomness(3)
        >>> [draw(one), draw(one)] == [draw(same), random.random() and draw(same)]
        True
    """

    def __init__(self, seed: int) -> None:
        self._state = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Draw from this state until the block ends, then from the process's again."""
        outside = random.getstate(), np.random.get_state()
        _restore(self._state)
        try:
            yield
        finally:
            self._state = random.getstate(), np.random.get_state()
            _restore(outside)


def _restore(state: Any) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])


@dataclass(frozen=True)
class SeededTask(PaidByTurns):
    """A task whose problems are the games of seeds: even seeds for training, odd ones for evaluation.

    A subclass names its game in `name` and makes one with `game`; its turns earn everything.

    Args:
        name: of the game.
        turns: at most, 1 to 1024; the game's own limit may be below.
        system: the system message, or None.
    """

    name: str
    turns: int = 32
    system: str | None = None
    hidden_state: ClassVar[bool] = True

    def __reduce__(self) -> Any:
        """A worker process makes the task anew, so that it imports the library before an episode's time counts."""
        return made_anew(self)

    def game(self) -> Game:
        """Return a new game, not yet started."""
        raise NotImplementedError

    @property
    def who(self) -> str:
        """The task in messages."""
        return f"{type(self).__name__.lower()}({self.name!r})"

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw games; see `Task.sample`."""
        seeds = [2 * (derive(type(self).__name__, self.name, seed, step, slot) % _SEEDS) for slot in range(n)]
        return [self._problem(f"{step}-{slot}", game) for slot, game in enumerate(seeds)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n of the games set aside; see `Task.held_out`."""
        return [self._problem(f"held-out-{i}", 2 * i + 1) for i in range(min(n, HELD_OUT))]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a game. Its problem's own seed decides it, so evaluation is the same in every run."""
        return GameEpisode(self.game, problem.data["seed"], self.system)

    def require(self) -> None:
        """Raise unless the fields are in their ranges and a game starts.

        Raises:
            InputError: a field out of its range, or a game that does not start.
        """
        require_turns(self.who, self.turns)
        self._problem("0", 0)

    def _problem(self, id: str, seed: int) -> Problem:
        """The problem of a seed, with what its game says first."""
        episode = GameEpisode(self.game, seed, self.system)
        try:
            observation = episode.reset()
        except InputError:
            raise
        except Exception as error:  # of a library, which may raise anything
            raise InputError(f"{self.who}: the game of seed {seed} does not start: {one_line(error)[:300]}") from None
        finally:
            episode.close()
        return Problem(id, observation.messages, "", {"seed": seed})


class GameEpisode:
    """An episode of a game.

    Args:
        make: returns the game.
        seed: of the game, and of all that it draws later.
        system: the system message, or None.
    """

    def __init__(self, make: Callable[[], Game], seed: int, system: str | None) -> None:
        self._make, self._seed, self._system = make, seed, system
        self._randomness = Randomness(seed)
        self._game: Game | None = None

    def reset(self) -> Observation:
        """Start the game."""
        with self._randomness.in_force():
            self._game = self._make()
            text = self._game.reset(self._seed)
        system = [] if self._system is None else [message("system", self._system)]
        return Observation((*system, message("user", text)))

    def step(self, turn: Turn) -> StepResult:
        """Take the turn's text as the action."""
        if self._game is None:
            raise RuntimeError("the episode was not reset")
        with self._randomness.in_force():
            answer = self._game.step(turn.text)
        messages = () if answer.done else (message("user", answer.text),)
        return StepResult(messages, answer.reward, answer.done, failed_calls=int(answer.failed))

    def close(self) -> None:
        """Close the game."""
        if self._game is not None:
            self._game.close()
            self._game = None
