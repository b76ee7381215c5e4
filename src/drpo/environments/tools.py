"""Plain Python functions as tools: their schemas from signature and docstring, their calls run, their results told."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from drpo.environments.contract import Environment
from drpo.errors import InputError
from drpo.spec import import_named
from drpo.types import Problem
from drpo.types.calls import Call, MalformedCall
from drpo.types.environment import Observation, StepResult, ToolSchema, Turn

Tool = Callable[..., Any]
MOST_CHARACTERS = 20_000
"""Of a result; what is longer is cut, and that is said."""

_UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
READY: Mapping[str, str] = {"python": "drpo.environments.sandbox:python"}
"""Short names of tools that ship."""


def tool_schema(tool: Tool) -> ToolSchema:
    """Return the schema of a function, from its annotations and its docstring.

    Raises:
        InputError: an argument without a type or without a line in the docstring's Args, or one that has no name in a
            call.

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
    unnamed = next((p for p in inspect.signature(tool).parameters.values() if p.kind in _UNNAMED), None)
    if unnamed is not None:
        raise InputError(
            f"tool {getattr(tool, '__name__', tool)!r}: the model names every argument in a call, and {unnamed} cannot "
            "be named; leave out `/` and `*` before it"
        )
    try:
        schema: ToolSchema = get_json_schema(tool)
    except Exception as error:  # transformers raises several kinds of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"tool {getattr(tool, '__name__', tool)!r}: {reason}; a tool needs a docstring with a line for every "
            "argument, and their types"
        ) from None
    return schema


@dataclass(frozen=True, init=False)
class Tools:
    """Python functions that the model may call while it answers a problem of any task.

    A function's schema comes from its annotations and its docstring. The model writes
    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, reads the result, and answers without a call in the end;
    the task's reward scores that last turn. A call that cannot be read, or that fails, is answered with what was wrong.

    Args:
        functions: each as `module:function`, or `python`: a sandbox in which the model's programs run
            (`drpo.environments.sandbox`).
        turns: at most so many in an episode, the answer among them, 1 or more.

    Raises:
        InputError: no function, one that cannot be imported, has no docstring or is a coroutine or a generator, two of
            one name, a number of turns below 1.

    Example:
        >>> Tools("statistics:mean")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: tool 'mean': Argument data is missing a type hint in function mean; a tool needs a \
docstring with a line for every argument, and their types
    """

    functions: tuple[str, ...]
    turns: int = 8

    def __init__(self, *functions: str | tuple[str, ...], turns: int = 8) -> None:
        names = [name for one in functions for name in (one if isinstance(one, tuple) else (one,))]
        object.__setattr__(self, "functions", tuple(names))
        object.__setattr__(self, "turns", turns)
        if not names:
            raise InputError("tools: name at least one function, as tools('module:function')")
        if type(turns) is not int or turns < 1:
            raise InputError(f"tools: turns={turns!r} must be a whole number of at least 1")
        for tool in self.by_name().values():
            tool_schema(tool)

    @property
    def max_turns(self) -> int:
        """`turns`."""
        return self.turns

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem."""
        return ToolEpisode(problem, self.by_name())

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Import the functions in a worker process before its limits of time and memory hold."""
        vars(self).update(state)
        self.by_name()

    def by_name(self) -> dict[str, Tool]:
        """Import the functions.

        Raises:
            InputError: one cannot be imported, or two have one name.
        """
        return by_name([_function(name) for name in self.functions])


def _function(spec: str) -> Tool:
    module, colon, name = READY.get(spec, spec).partition(":") if isinstance(spec, str) else ("", "", "")
    tool: Any = import_named(module, name, "tool") if colon else None
    if not (callable(tool) and hasattr(tool, "__name__")):
        raise InputError(f"tools: {spec!r} is no function; write it as 'module:function', or {', '.join(READY)}")
    if inspect.iscoroutinefunction(tool) or inspect.isgeneratorfunction(tool) or inspect.isasyncgenfunction(tool):
        raise InputError(f"tools: {spec!r} is a coroutine or a generator; a tool returns its result: `def`, no `yield`")
    return tool  # type: ignore[no-any-return]


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
        calls = turn.tool_calls
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
        except InputError:  # the tool cannot work here, whatever it is called with
            raise
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
