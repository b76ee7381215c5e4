"""Sums of two integers: the smallest task on which learning shows."""

import random
from dataclasses import dataclass
from functools import cached_property

from drpo.errors import InputError
from drpo.rewards import Reward, exact_number
from drpo.seeds import derive
from drpo.types import Problem

_MOST_HELD_OUT = 512


@dataclass(frozen=True)
class Addition:
    """The task "What is a + b?", with a and b uniform over the integers in [low, high].

    Half of all pairs (a, b), at most 512, are set aside for evaluation.

    Args:
        low: smallest summand.
        high: largest summand, >= low.

    Raises:
        InputError: a bound that is not an integer, or high < low.

    Example:
        >>> problem = Addition(1, 20).sample(1, step=0, seed=0)[0]
        >>> problem.prompt, problem.answer
        ('What is 16 + 13?', '29')
    """

    low: int = 1
    high: int = 50

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if type(value) is not int:
                raise InputError(f"addition: {name}={value!r} must be an integer")
        if self.high < self.low:
            raise InputError(f"addition: high={self.high} must be at least low={self.low}")

    @property
    def reward(self) -> Reward:
        """Score 1 if the last number of the text is the sum."""
        return exact_number

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw from the pairs that are not held out, with replacement; see `Task.sample`."""
        return [self._problem(f"{step}-{slot}", self._draw(seed, step, slot)) for slot in range(n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n pairs set aside; see `Task.held_out`."""
        if n and not self._held_out:
            raise InputError(f"addition: low={self.low} and high={self.high} leave no pair to hold out")
        return [self._problem(f"held-out-{i}", pair) for i, pair in enumerate(list(self._held_out)[:n])]

    @cached_property
    def _held_out(self) -> dict[int, None]:
        """Return the held-out pairs, by their index in [0, width**2), in a fixed order."""
        n_pairs = self._width**2
        rng = random.Random(derive("addition", "held out", self.low, self.high))
        return dict.fromkeys(rng.sample(range(n_pairs), min(n_pairs // 2, _MOST_HELD_OUT)))

    @property
    def _width(self) -> int:
        return self.high - self.low + 1

    def _draw(self, seed: int, step: int, slot: int) -> int:
        rng = random.Random(derive("addition", seed, step, slot))
        while (pair := rng.randrange(self._width**2)) in self._held_out:  # at most half of them are
            pass
        return pair

    def _problem(self, name: str, pair: int) -> Problem:
        a, b = (self.low + part for part in divmod(pair, self._width))
        return Problem.of_text(name, f"What is {a} + {b}?", str(a + b))
