"""Small games in text, which take several turns: guessing a number, walking to a goal, finding a word."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar

from drpo.environments.contract import Environment
from drpo.environments.rewards import PaidByTurns
from drpo.errors import InputError
from drpo.rewards import in_process
from drpo.rewards.number import last_number
from drpo.seeds import derive
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import Message, message

_HELD_OUT = 512
Said = Sequence[tuple[str, str]]


@in_process
@dataclass(frozen=True)
class Guess(PaidByTurns):
    """Find a number between two bounds, told "higher" or "lower" after each guess.

    An episode that finds it earns 1. Guessing without using the hints wins turns / (high - low + 1) of them at most.

    Args:
        low: smallest number.
        high: largest, above low.
        turns: guesses.
        examples: solved conversations in the prompt, 0 to 2.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> task = Guess(1, 10)
        >>> problem = task.sample(1, step=0, seed=0)[0]
        >>> task.open(problem, seed=0).step(Turn("0", (), "stop")).messages[0]["content"]
        'higher'
    """

    hidden_state: ClassVar[bool] = True  # problems are told apart by their numbers

    low: int = 1
    high: int = 10
    turns: int = 4
    examples: int = 1

    def __post_init__(self) -> None:
        _require("guess", self.low < self.high, "high", self.high, f"must be above low={self.low}")
        _require("guess", 1 <= self.turns <= 64, "turns", self.turns, "must be from 1 to 64")
        _require("guess", 0 <= self.examples <= 2, "examples", self.examples, "must be from 0 to 2")

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw numbers; see `Task.sample`. There are few, so evaluation sees the same numbers in other episodes."""
        return [self._problem(f"{step}-{slot}", ("guess", seed, step, slot)) for slot in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return n episodes in which every number occurs equally often; see `Task.held_out`."""
        width = self.high - self.low + 1
        return [self._of(f"held-out-{i}", self.low + i % width) for i in range(min(n, _HELD_OUT))]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem, whose answer is the number."""
        return _Guessing(problem)

    def _problem(self, name: str, key: tuple[int | str, ...]) -> Problem:
        return self._of(name, random.Random(derive(*key)).randint(self.low, self.high))

    def _of(self, name: str, number: int) -> Problem:
        about = f"I think of a number between {self.low} and {self.high}. Guess it. Say a number alone."
        rng = random.Random(derive("guess", "examples", self.low, self.high))
        said = [s for _ in range(self.examples) for s in self._example(about, rng.randint(self.low, self.high))]
        return Problem(name, _messages([*said, ("user", about)]), str(number))

    def _example(self, about: str, number: int) -> Said:
        """A bisection."""
        said, low, high = [("user", about)], self.low, self.high
        while (guess := (low + high) // 2) != number:
            low, high = (guess + 1, high) if guess < number else (low, guess - 1)
            said += [("assistant", str(guess)), ("user", _hint(guess, number))]
        return [*said, ("assistant", str(number)), ("user", "Right."), ("assistant", "Good.")]


def _hint(guess: int, number: int) -> str:
    return "higher" if guess < number else "lower"


class _Guessing:
    def __init__(self, problem: Problem) -> None:
        self._problem, self._number = problem, int(problem.answer)

    def reset(self) -> Observation:
        return Observation(self._problem.messages)

    def step(self, turn: Turn) -> StepResult:
        guess = last_number(turn.text)
        if guess is None:
            return StepResult((message("user", "Say a number."),), failed_calls=1)
        if guess == self._number:
            return StepResult(reward=1.0, done=True)
        return StepResult((message("user", "higher" if guess < self._number else "lower"),))

    def close(self) -> None:
        pass


_WAYS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


@in_process
@dataclass(frozen=True)
class Walk(PaidByTurns):
    """Walk to a goal on a grid, one step a turn, told where one is after each.

    An episode that reaches the goal earns 1.

    Args:
        distance: of the goal at most, 1 to 8.
        turns: steps.
        examples: solved conversations in the prompt, 0 to 2.

    Raises:
        InputError: a value out of its range.
    """

    distance: int = 3
    turns: int = 6
    examples: int = 1

    def __post_init__(self) -> None:
        _require("walk", 1 <= self.distance <= 8, "distance", self.distance, "must be from 1 to 8")
        _require("walk", self.distance <= self.turns <= 64, "turns", self.turns, "must be from distance to 64")
        _require("walk", 0 <= self.examples <= 2, "examples", self.examples, "must be from 0 to 2")

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw a start and a goal; see `Task.sample`."""
        return [self._problem(f"{step}-{slot}", "walk", seed, step, slot) for slot in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n of the walks set aside; see `Task.held_out`."""
        return [self._problem(f"held-out-{i}", "walk", "held out", i) for i in range(min(n, _HELD_OUT))]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem."""
        return _Walking(problem)

    def _problem(self, name: str, *key: int | str) -> Problem:
        rng = random.Random(derive(*key))
        example_rng = random.Random(derive("walk", "examples"))
        said = [s for _ in range(self.examples) for s in _walked(*self._ends(example_rng))]
        start, goal = self._ends(rng)
        data = {"start": start, "goal": goal}
        return Problem(name, _messages([*said, ("user", _task_of(start, goal))]), "", data)

    def _ends(self, rng: random.Random) -> tuple[list[int], list[int]]:
        start = [rng.randint(0, 9), rng.randint(0, 9)]
        east = rng.randint(-self.distance, self.distance)
        room = self.distance - abs(east)
        north = rng.randint(-room, room) or (0 if east else 1)
        return start, [start[0] + east, start[1] + north]


def _task_of(start: Sequence[int], goal: Sequence[int]) -> str:
    return (
        f"You are at x={start[0]} y={start[1]}. Go to x={goal[0]} y={goal[1]}. North adds 1 to y, south takes 1, east "
        "adds 1 to x, west takes 1. Say one word: north, south, east or west."
    )


def _walked(start: Sequence[int], goal: Sequence[int]) -> Said:
    said, (x, y) = [("user", _task_of(start, goal))], start
    while [x, y] != list(goal):
        way = "east" if x < goal[0] else "west" if x > goal[0] else "north" if y < goal[1] else "south"
        x, y = x + _WAYS[way][0], y + _WAYS[way][1]
        said += [("assistant", way), ("user", f"You are at x={x} y={y}." if [x, y] != list(goal) else "You are there.")]
    return [*said, ("assistant", "Good.")]


class _Walking:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._at, self._goal = list(problem.data["start"]), list(problem.data["goal"])

    def reset(self) -> Observation:
        return Observation(self._problem.messages)

    def step(self, turn: Turn) -> StepResult:
        said = [way for way in re.findall(r"[a-z]+", turn.text.lower()) if way in _WAYS]
        if len(said) != 1:
            return StepResult((message("user", "Say one of north, south, east, west."),), failed_calls=1)
        self._at = [a + d for a, d in zip(self._at, _WAYS[said[0]], strict=True)]
        if self._at == self._goal:
            return StepResult(reward=1.0, done=True)
        return StepResult((message("user", f"You are at x={self._at[0]} y={self._at[1]}."),))

    def close(self) -> None:
        pass


_WORDS = tuple(files(__package__).joinpath("words.txt").read_text(encoding="utf-8").split())


@in_process
@dataclass(frozen=True)
class WordGame(PaidByTurns):
    """Find a word of five letters, told after each guess which of its letters are right and in place.

    The reply has a letter that is in place as a capital, one that is elsewhere in the word as a small letter, and a dot
    for one that is not in it. An episode that finds the word earns 1.

    Args:
        turns: guesses.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> feedback("stone", "shore")
        'S.O.E'
    """

    hidden_state: ClassVar[bool] = True  # problems are told apart by their words

    turns: int = 6

    def __post_init__(self) -> None:
        _require("word_game", 1 <= self.turns <= 64, "turns", self.turns, "must be from 1 to 64")

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw words of the first four fifths of the list; see `Task.sample`."""
        known = _WORDS[: 4 * len(_WORDS) // 5]
        rngs = [random.Random(derive("word game", seed, step, slot)) for slot in range(n)]
        return [_word_problem(f"{step}-{slot}", rng.choice(known)) for slot, rng in enumerate(rngs)]

    def held_out(self, n: int) -> list[Problem]:
        """Return problems of the other words; see `Task.held_out`."""
        return [_word_problem(f"held-out-{i}", w) for i, w in enumerate(_WORDS[4 * len(_WORDS) // 5 :][:n])]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem, whose answer is the word."""
        return _WordEpisode(problem)


def feedback(word: str, guess: str) -> str:
    """Return what a guess is told; both of equal length."""
    left = [w for w, g in zip(word, guess, strict=True) if w != g]
    said = []
    for w, g in zip(word, guess, strict=True):
        if w == g:
            said.append(g.upper())
        elif g in left:
            left.remove(g)
            said.append(g)
        else:
            said.append(".")
    return "".join(said)


def _word_problem(name: str, word: str) -> Problem:
    about = (
        "I think of an English word of five letters. Guess it: say one word of five letters. I answer with a capital "
        "for a letter in its place, a small letter for one that is elsewhere, a dot for one that is not in the word."
    )
    return Problem(name, _messages([("user", about)]), word)


class _WordEpisode:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def reset(self) -> Observation:
        return Observation(self._problem.messages)

    def step(self, turn: Turn) -> StepResult:
        guesses = re.findall(r"\b[a-z]{5}\b", turn.text.lower())
        if not guesses:
            return StepResult((message("user", "Say one word of five letters."),), failed_calls=1)
        if guesses[-1] == self._problem.answer:
            return StepResult(reward=1.0, done=True)
        return StepResult((message("user", feedback(self._problem.answer, guesses[-1])),))

    def close(self) -> None:
        pass


def _messages(said: Said) -> tuple[Message, ...]:
    return tuple(message(role, text) for role, text in said)


def _require(task: str, fine: bool, name: str, value: Any, rule: str) -> None:
    if not fine or type(value) is not int:
        raise InputError(f"{task}: {name}={value!r}: {rule if type(value) is int else 'must be an integer'}")
