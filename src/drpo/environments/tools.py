"""Plain Python functions as tools: their schemas from signature and docstring, their calls run, their results told."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from drpo.environments.calls import Call, MalformedCall, read_calls
from drpo.errors import InputError
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, ToolSchema, Turn

Tool = Callable[..., Any]
MOST_CHARACTERS = 20_000
"""Of a result; what is longer is cut, and that is said."""


def tool_schema(tool: Tool) -> ToolSchema:
    """Return the schema of a function, from its annotations and its docstring.

    Raises:
        InputError: an argument without a type or without a line in the docstring's Args.

    Example:
        >>> def double(x: int) -> int:
        ...     '''Double a number.
        ...
        ...     Args:
        ...         x: the number.
        ...     '''
        ...     return 2 * x
        >>> tool_schema(double)["function"]["parameters"]["required"]
        ['x']
    """
    try:
        schema: ToolSchema = get_json_schema(tool)
    except Exception as error:  # transformers raises several kinds of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"tool {getattr(tool, '__name__', tool)!r}: {reason}; a tool needs a docstring with a line for every "
            "argument, and their types"
        ) from None
    return schema


class ToolEpisode:
    """An episode in which the model may call tools until it answers without a call.

    Args:
        problem: the question.
        tools: by the names that the model calls them.
    """

    def __init__(self, problem: Problem, tools: Mapping[str, Tool]) -> None:
        self._problem, self._tools = problem, tools

    def reset(self) -> Observation:
        """Return the problem's messages and the tools' schemas."""
        return Observation(self._problem.messages, tuple(tool_schema(tool) for tool in self._tools.values()))

    def step(self, turn: Turn) -> StepResult:
        """Run the turn's calls, one after the other; a turn without one ends the episode."""
        calls = read_calls(turn.text)
        if not calls:
            return StepResult(done=True)
        told = [self._run(call) for call in calls]
        return StepResult(
            tuple({"role": "tool", "name": name, "content": text} for name, text, _ in told),
            calls=tuple(call.as_message for call in calls if isinstance(call, Call)),
            failed_calls=sum(failed for _, _, failed in told),
        )

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, call: Call | MalformedCall) -> tuple[str, str, bool]:
        if isinstance(call, MalformedCall):
            return "error", f"Error: {call.reason}", True
        if call.name not in self._tools:
            return call.name, f"Error: there is no tool {call.name!r}; there are {', '.join(self._tools)}", True
        tool = self._tools[call.name]
        try:
            inspect.signature(tool).bind(**call.arguments)
        except TypeError as error:
            return call.name, f"Error: {call.name}: {error}", True
        try:
            return call.name, _text(tool(**call.arguments)), False
        except Exception as error:  # of the tool, for the model to learn from
            return call.name, _cut(f"Error: {type(error).__name__}: {error}"), True


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Return tools by their names.

    Raises:
        InputError: two of one name.
    """
    named = {tool.__name__: tool for tool in tools}
    if len(named) < len(tools):
        raise InputError(f"tools: two have one name: {', '.join(t.__name__ for t in tools)}")
    return named


def _text(result: Any) -> str:
    if isinstance(result, str):
        return _cut(result)
    try:
        return _cut(json.dumps(result, ensure_ascii=False))
    except (TypeError, ValueError):
        return _cut(str(result))


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}... (cut: {len(text):,} characters)"
