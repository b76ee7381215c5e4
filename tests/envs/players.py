"""Tasks for a model that knows no action: what it says is read as one, by its length."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from drpo.environments.contract import Environment
from drpo.environments.libraries.gem import Gem
from drpo.environments.libraries.trl import TrlEnvironment
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn


@dataclass(frozen=True)
class Player:
    """An episode of another environment.

    Args:
        inner: the environment.
        action: returns what is said to it in place of a text.
    """

    inner: Environment
    action: Callable[[str], str]

    def reset(self) -> Observation:
        return self.inner.reset()

    def step(self, turn: Turn) -> StepResult:
        return self.inner.step(replace(turn, text=self.action(turn.text)))

    def close(self) -> None:
        self.inner.close()


class Buying(TrlEnvironment):
    """Every other text buys tea."""

    def open(self, problem: Problem, seed: int) -> Environment:
        call = '<tool_call>{"name": "buy", "arguments": {"what": "tea"}}</tool_call>'
        return Player(super().open(problem, seed), lambda text: call if len(text) % 2 else "No.")


class Guessing(Gem):
    """Every text guesses a number from 1 to 9."""

    def open(self, problem: Problem, seed: int) -> Environment:
        return Player(super().open(problem, seed), lambda text: f"\\boxed{{{1 + len(text) % 9}}}")
