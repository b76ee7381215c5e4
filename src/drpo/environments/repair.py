"""Programs with a fault, to be mended in several turns: the tests that fail are told after each."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from drpo.environments.contract import Environment
from drpo.environments.rewards import PaidByTurns
from drpo.errors import InputError
from drpo.rewards import PythonTests
from drpo.seeds import derive
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import message

_PROGRAMS: Mapping[str, tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    "add": (
        "def add(a, b):\n    return a + b\n",
        (("a + b", "a - b"), ("a + b", "a * b"), ("a + b", "a + a")),
        ("add(2, 3) == 5", "add(-1, 1) == 0", "add(10, 7) == 17"),
    ),
    "largest": (
        "def largest(xs):\n    best = xs[0]\n    for x in xs:\n        if x > best:\n            best = x\n"
        "    return best\n",
        (("x > best", "x < best"), ("return best", "return xs[0]"), ("best = x\n    return", "best = 0\n    return")),
        ("largest([3, 9, 2]) == 9", "largest([-5, -2]) == -2", "largest([4]) == 4"),
    ),
    "is_even": (
        "def is_even(n):\n    return n % 2 == 0\n",
        (("== 0", "== 1"), ("% 2", "// 2"), ("n % 2 == 0", "n % 2")),
        ("is_even(4) is True", "is_even(7) is False", "is_even(0) is True"),
    ),
    "factorial": (
        "def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result\n",
        (("n + 1", "n"), ("result = 1", "result = 0"), ("*= i", "+= i")),
        ("factorial(5) == 120", "factorial(0) == 1", "factorial(3) == 6"),
    ),
    "reverse": (
        "def reverse(text):\n    return text[::-1]\n",
        (("[::-1]", "[::1]"), ("[::-1]", "[:-1]"), ("[::-1]", "[::-2]")),
        ("reverse('abc') == 'cba'", "reverse('') == ''", "reverse('xy') == 'yx'"),
    ),
    "count": (
        "def count(text, letter):\n    n = 0\n    for c in text:\n        if c == letter:\n            n += 1\n"
        "    return n\n",
        (("n += 1", "n = 1"), ("c == letter", "c != letter"), ("return n", "return len(text)")),
        ("count('banana', 'a') == 3", "count('xyz', 'a') == 0", "count('aa', 'a') == 2"),
    ),
    "mean": (
        "def mean(xs):\n    return sum(xs) / len(xs)\n",
        (("/ len(xs)", "// len(xs)"), ("sum(xs)", "max(xs)"), ("/ len(xs)", "/ 2")),
        ("mean([1, 2]) == 1.5", "mean([4]) == 4", "mean([1, 2, 6]) == 3"),
    ),
    "clamp": (
        "def clamp(x, low, high):\n    return max(low, min(x, high))\n",
        (("max(low, min", "min(low, max"), ("min(x, high)", "min(x, low)"), ("max(low, min(x, high))", "min(x, high)")),
        ("clamp(5, 0, 3) == 3", "clamp(-2, 0, 3) == 0", "clamp(2, 0, 3) == 2"),
    ),
}
"""Name -> the right program, replacements that break it, and what must hold."""

_HELD_OUT = ("mean", "clamp")


@dataclass(frozen=True)
class Repair(PaidByTurns):
    """The task to mend a Python function; each turn is a program, and is told which tests it fails.

    A program that passes all tests earns 1. Programs run in the sandbox of `PythonTests`.

    Args:
        turns: programs.
        seconds: for the tests of one.

    Raises:
        InputError: a value out of its range.
    """

    turns: int = 3
    seconds: float = 2.0

    def __post_init__(self) -> None:
        if type(self.turns) is not int or not 1 <= self.turns <= 16:
            raise InputError(f"repair: turns={self.turns!r} must be an integer from 1 to 16")
        PythonTests(seconds=self.seconds)

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw a program and its fault, of those not held out; see `Task.sample`."""
        names = [name for name in _PROGRAMS if name not in _HELD_OUT]
        rngs = [random.Random(derive("repair", seed, step, slot)) for slot in range(n)]
        return [_problem(f"{step}-{slot}", rng.choice(names), rng.randrange(3)) for slot, rng in enumerate(rngs)]

    def held_out(self, n: int) -> list[Problem]:
        """Return faults of the programs set aside; see `Task.held_out`."""
        every = [(name, fault) for fault in range(3) for name in _HELD_OUT]
        return [_problem(f"held-out-{i}", name, fault) for i, (name, fault) in enumerate(every[:n])]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem."""
        return _Mending(problem, PythonTests(seconds=self.seconds))


def _problem(name: str, program: str, fault: int) -> Problem:
    right, faults, tests = _PROGRAMS[program]
    broken = right.replace(*faults[fault])
    prompt = f"This function has a fault. Write it again, mended, in one Python block.\n\n```python\n{broken}```"
    return Problem.of_text(name, prompt, right, data={"tests": [f"assert {test}" for test in tests]})


class _Mending:
    def __init__(self, problem: Problem, run: PythonTests) -> None:
        self._problem, self._run = problem, run

    def reset(self) -> Observation:
        return Observation(self._problem.messages)

    def step(self, turn: Turn) -> StepResult:
        failed = [test for test in self._problem.data["tests"] if not self._passes(test, turn.text)]
        if not failed:
            return StepResult(reward=1.0, done=True)
        told = "\n".join(["These tests fail:", *failed, "Write the function again, in one Python block."])
        return StepResult((message("user", told),))

    def _passes(self, test: str, text: str) -> bool:
        problem = Problem(self._problem.id, self._problem.messages, "", {"tests": [test]})
        return self._run(problem, text) == 1.0

    def close(self) -> None:
        pass
