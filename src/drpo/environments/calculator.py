"""Products that a small model cannot work out in its head, and a calculator that it may ask."""

import random
import re
from dataclasses import dataclass
from functools import cached_property
from math import prod

from drpo.environments.arithmetic import calculate
from drpo.environments.contract import Environment
from drpo.environments.rewards import turns_say_all
from drpo.errors import InputError
from drpo.rewards import Reward, in_process
from drpo.rewards.number import last_number
from drpo.seeds import derive
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import message

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_HELD_OUT = 512
_SYSTEM = "You can use a calculator: write <calc>a * b</calc> and the result is sent to you. Then say the answer."


@in_process
@dataclass(frozen=True)
class Calculator:
    """The task "What is a * b?", of several digits, with a calculator.

    The model writes `<calc>a * b</calc>`, reads "Result: ..." and says the answer. An episode whose last turn ends in
    the right number earns 1. With more than two factors the calculator takes one operation at a time, so several calls
    are needed.

    Args:
        digits: of each factor, 1 to 6.
        factors: how many, 2 to 4.
        examples: solved conversations in the prompt, 0 to 2.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> problem = Calculator(examples=0).sample(1, step=0, seed=0)[0]
        >>> environment = Calculator().open(problem, seed=0)
        >>> environment.step(Turn("<calc>2 * 21</calc>", (), "stop")).messages
        ({'role': 'user', 'content': 'Result: 42'},)
    """

    digits: int = 2
    factors: int = 2
    examples: int = 1

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("digits", self.digits, 1, 6),
            ("factors", self.factors, 2, 4),
            ("examples", self.examples, 0, 2),
        ):
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"calculator: {name}={value!r} must be an integer from {low} to {high}")

    @property
    def reward(self) -> Reward:
        """The turns earn it all."""
        return turns_say_all

    @property
    def max_turns(self) -> int:
        """One for each operation, one for the answer, and one to spare."""
        return self.factors + 1

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw products that are not held out; see `Task.sample`."""
        return [self._problem(f"{step}-{slot}", self._draw(seed, step, slot)) for slot in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n of the products set aside; see `Task.held_out`."""
        return [self._problem(f"held-out-{i}", f) for i, f in enumerate(self._set_aside[:n])]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem; nothing in it is random."""
        return _Episode(problem, one_at_a_time=self.factors > 2)

    @cached_property
    def _set_aside(self) -> list[tuple[int, ...]]:
        rng = random.Random(derive("calculator", "held out", self.digits, self.factors))
        n_all = (9 * 10 ** (self.digits - 1)) ** self.factors
        found: dict[tuple[int, ...], None] = {}
        while len(found) < min(_HELD_OUT, n_all // 2):
            found[self._factors(rng)] = None
        return list(found)

    def _factors(self, rng: random.Random) -> tuple[int, ...]:
        low = 10 ** (self.digits - 1)
        return tuple(rng.randrange(low, 10 * low) for _ in range(self.factors))

    def _draw(self, seed: int, step: int, slot: int) -> tuple[int, ...]:
        rng = random.Random(derive("calculator", seed, step, slot))
        while (drawn := self._factors(rng)) in self._lookup:
            pass
        return drawn

    @cached_property
    def _lookup(self) -> frozenset[tuple[int, ...]]:
        return frozenset(self._set_aside)

    def _problem(self, name: str, factors: tuple[int, ...]) -> Problem:
        rng = random.Random(derive("calculator", "examples", self.digits, self.factors))
        examples = [m for _ in range(self.examples) for m in _example(self._factors(rng))]
        question = message("user", _question(factors))
        return Problem(name, (message("system", _SYSTEM), *examples, question), str(prod(factors)))


def _question(factors: tuple[int, ...]) -> str:
    return f"What is {' * '.join(map(str, factors))}?"


def _example(factors: tuple[int, ...]) -> list[dict[str, str]]:
    said = [("user", _question(factors))]
    value = factors[0]
    for factor in factors[1:]:
        said += [("assistant", f"<calc>{value} * {factor}</calc>"), ("user", f"Result: {value * factor}")]
        value *= factor
    return [dict(message(role, text)) for role, text in [*said, ("assistant", f"The answer is {value}.")]]


class _Episode:
    def __init__(self, problem: Problem, one_at_a_time: bool) -> None:
        self._problem, self._one_at_a_time = problem, one_at_a_time

    def reset(self) -> Observation:
        return Observation(self._problem.messages)

    def step(self, turn: Turn) -> StepResult:
        calls = _CALL.findall(turn.text)
        if not calls:
            number = last_number(turn.text)
            return StepResult(reward=float(number is not None and number == int(self._problem.answer)), done=True)
        expression = calls[-1]
        value = calculate(expression)
        if value is not None and self._one_at_a_time and sum(map(expression.count, "*+-")) > 1:
            return _reply("Error: one operation at a time", failed=1)
        if value is None:
            return _reply("Error: write two integers with * + or - between them", failed=1)
        return _reply(f"Result: {value}")

    def close(self) -> None:
        pass


def _reply(text: str, failed: int = 0) -> StepResult:
    return StepResult((message("user", text),), failed_calls=failed)
