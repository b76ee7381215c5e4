"""Classes written for TRL's `environment_factory`, unchanged."""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drpo.environments.contract import Environment
from drpo.environments.libraries.imports import environment_class
from drpo.environments.libraries.loop import settled
from drpo.environments.libraries.rows import RowsTask
from drpo.environments.libraries.seeded import Randomness
from drpo.environments.rewards import turns_say_all
from drpo.environments.tools import Tool, ToolEpisode, tool_schema
from drpo.errors import InputError, one_line
from drpo.rewards import Reward
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn

_OTHER = ("reset", "get_reward")


@dataclass(frozen=True)
class TrlEnvironment(RowsTask):
    """A class written for `GRPOTrainer(environment_factory=...)` of TRL: `trl_environment('my_envs:Shop', 'gsm8k')`.

    As in TRL 1.16: its public methods are the tools, with schemas from annotations and docstrings; `reset(**row)` gets
    the row, `prompt`, `answer` and the problem's data, and what it returns is appended to the last message;
    `get_reward()`, if there is one, is called once, after the last turn, and is the reward. Without one the rows' own
    reward scores the last turn. Other than in TRL, the class is made anew for each episode, where TRL resets it, and an
    episode whose turn is cut off at the limit of tokens is not asked for its reward: it earns 0.

    Args:
        environment: the class, as `module:Class`; it is made without arguments.
        rows: the spec of the task with the problems.
        turns: at most, 1 to 1024, the answer among them.

    Raises:
        InputError: a class that cannot be imported or made, that has no `reset` or no tool, or whose tools have no
            docstrings; a value out of its range.
    """

    who: ClassVar[str] = "trl_environment"

    def __post_init__(self) -> None:
        made = self.make()
        if not callable(getattr(made, "reset", None)):
            raise InputError(f"{self.who}: {self.environment} has no reset(**row)")
        tools = _tools(made)
        if not tools:
            raise InputError(f"{self.who}: {self.environment} has no public method besides reset, so no tool")
        for tool in tools.values():
            tool_schema(tool)
        self.require()

    @property
    def reward(self) -> Reward:
        """None of its own where the class has `get_reward`, else the rows'."""
        owned = hasattr(environment_class(self.environment, self.who), "get_reward")
        return turns_say_all if owned else self.rows_task.reward

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem."""
        return _Episode(self, problem, seed)

    def make(self) -> Any:
        """Return a new object of the class.

        Raises:
            InputError: the class cannot be imported or made.
        """
        try:
            return environment_class(self.environment, self.who)()
        except InputError:
            raise
        except Exception as error:  # of the class, which may raise anything
            raise InputError(f"{self.who}: {self.environment}() cannot be made: {one_line(error)}") from None


class _Episode:
    def __init__(self, task: TrlEnvironment, problem: Problem, seed: int) -> None:
        self._made, self._problem, self._randomness = task.make(), problem, Randomness(seed % 2**32)
        self._tools = ToolEpisode(problem, {name: _as_text(tool) for name, tool in _tools(self._made).items()})
        self._turns_left = task.turns

    def reset(self) -> Observation:
        *before, last = self._problem.messages
        with self._randomness.in_force():
            text = self._made.reset(**_row(self._problem))
        if text is not None and not isinstance(text, str):
            raise ValueError(f"reset() returned {type(text).__name__}; drpo reads None or a text")
        messages = (*before, {**last, "content": last["content"] + (text or "")})
        return Observation(messages, self._tools.reset().tools)

    def step(self, turn: Turn) -> StepResult:
        self._turns_left -= 1
        with self._randomness.in_force():
            result = self._tools.step(turn)
            over = result.done or self._turns_left == 0
            if over and hasattr(self._made, "get_reward"):
                result = replace(result, reward=float(settled(self._made.get_reward())))
        return result

    def close(self) -> None:
        pass


def _row(problem: Problem) -> dict[str, Any]:
    """The fields that TRL hands over: the prompt, and the others."""
    fields = {"answer": problem.answer, **problem.data}
    return {**{str(k): v for k, v in fields.items()}, "prompt": [dict(m) for m in problem.messages]}


def _tools(made: Any) -> Mapping[str, Tool]:
    """The public methods of a class, by name, as TRL lists them."""
    names = [name for name, _ in inspect.getmembers(type(made), predicate=inspect.isfunction)]
    return {name: getattr(made, name) for name in names if name not in _OTHER and not name.startswith("_")}


def _as_text(tool: Tool) -> Tool:
    """The tool with its result as a text, as TRL tells it; a coroutine is waited for."""

    @functools.wraps(tool)
    def called(*args: Any, **kwargs: Any) -> str:
        return str(settled(tool(*args, **kwargs)))

    return called
