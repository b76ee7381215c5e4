"""Tasksets of verifiers (`pip install verifiers`)."""

import asyncio
import atexit
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from drpo.environments.contract import Environment
from drpo.environments.libraries.imports import library, made_anew, require_turns
from drpo.environments.libraries.loop import event_loop, wait_for
from drpo.environments.rewards import PaidByTurns
from drpo.errors import InputError, one_line
from drpo.seeds import derive
from drpo.spec import names_code
from drpo.types import Problem
from drpo.types.calls import Call
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import Message, message

_BRIDGE = "drpo.environments.libraries.verifiers_bridge"


@dataclass(frozen=True)
class Verifiers(PaidByTurns):
    """A taskset of verifiers 0.4 by its class: `verifiers('my_taskset:MyTaskset')`.

    Its environment plays each episode as it does under verifiers: users, tools, stops and scores are its own; the turns
    are sampled here. It runs in verifiers' local runtime: tasksets that need a container are refused. Calls are read as
    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. An episode with a second conversation, or one in which
    something that was said is rewritten, fails: what it would train on is not what was sampled.

    Args:
        taskset: the class, as `module:Class`; the module is what verifiers calls the taskset's id.
        config: fields of its configuration: {"game": "Wordle-v0"}.
        environment: the class of another environment than the taskset's own, as `module:Class`; empty is its own.
        turns: at most, 1 to 1024.
        holdout: the first so many tasks are for evaluation, of a finite taskset half of them at most.

    Raises:
        InputError: verifiers is not installed, a taskset that cannot be loaded or needs a container, a value out of its
            range.
    """

    taskset: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    environment: str = ""
    turns: int = 16
    holdout: int = 64
    hidden_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_turns(self.who, self.turns)
        if type(self.holdout) is not int or not 0 <= self.holdout <= 10**6:
            raise InputError(f"{self.who}: holdout={self.holdout!r} must be an integer from 0 to 1,000,000")
        for name, spec in (("taskset", self.taskset), ("environment", self.environment or "a:B")):
            if not (names_code(spec) and all(part.isidentifier() for part in spec.split(":"))):
                raise InputError(f"{self.who}: {name}={spec!r} must name a class, as 'module:Class', with no dots")
        try:
            needs_container = _loaded(self).tasks.task_type().NEEDS_CONTAINER
        except InputError:
            raise
        except Exception as error:  # of verifiers or the taskset, which may raise anything
            raise InputError(f"{self.who}: cannot be loaded: {one_line(error)[:300]}") from None
        if needs_container:
            raise InputError(f"{self.who}: its tasks need a container, which drpo does not start")

    def __reduce__(self) -> Any:
        """As of all tasks of libraries."""
        return made_anew(self)

    @property
    def who(self) -> str:
        """The task in messages."""
        return f"verifiers({self.taskset!r})"

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        """Draw tasks without replacement, in a new order every epoch; of an endless taskset, the next ones."""
        places = range(step * n, (step + 1) * n)
        if _loaded(self).endless:
            indices = [self.holdout + place for place in places]
        else:
            indices = [self._shuffled(place, seed) for place in places]
        return [self._problem(f"{step}-{slot}", index) for slot, index in enumerate(indices)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first n tasks; see `Task.held_out`."""
        return [self._problem(f"held-out-{i}", i) for i in range(min(n, self._n_held_out))]

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a task, whose randomness is the taskset's own."""
        return _Episode(self, problem)

    @property
    def _n_held_out(self) -> int:
        return self.holdout if _loaded(self).endless else min(self.holdout, len(_tasks(self)) // 2)

    def _shuffled(self, place: int, seed: int) -> int:
        n = len(_tasks(self)) - self._n_held_out
        if n < 1:
            raise InputError(f"{self.who}: has no tasks to train on")
        epoch, position = divmod(place, n)
        return self._n_held_out + random.Random(derive("verifiers", seed, epoch)).sample(range(n), n)[position]

    def _problem(self, id: str, index: int) -> Problem:
        data = _tasks(self, index + 1)[index].data
        return Problem(id, _opening(data), "", {"index": index})


class _Loaded:
    """A taskset in this process, with the tasks read so far, and with its servers once an episode is played."""

    def __init__(self, task: Verifiers) -> None:
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.append(here)  # last, as for all modules that specs name
        library("verifiers.v1", task.who, "verifiers")
        self.bridge = library(_BRIDGE, task.who, "verifiers")
        module, _, name = task.taskset.partition(":")
        other, _, environment = task.environment.partition(":")
        self._taskset = self.bridge.Taskset(module, task.config, other, task.turns)
        self.tasks, self.endless = self._taskset.tasks, self._taskset.endless
        exported = {"taskset": (self.tasks, name), "environment": (self._taskset.environment, environment)}
        for kind, (value, wanted) in exported.items():
            if wanted and type(value).__name__ != wanted:
                raise InputError(f"{task.who}: the module's {kind} is {type(value).__name__}, not {wanted}")
        self._unread: Iterator[Any] = iter(self.tasks)
        self._read: list[Any] = []

    def first(self, n: int | None) -> Sequence[Any]:
        """The first n tasks, or all."""
        more = None if n is None else max(0, n - len(self._read))
        self._read += islice(self._unread, more)
        return self._read

    @cached_property
    def serving(self) -> Any:
        """The taskset with its servers, which end with this process."""
        wait_for(self._taskset.start())
        atexit.register(self._end)
        return self._taskset

    def _end(self) -> None:
        with suppress(Exception):  # threads can no longer be started: a folder of verifiers' may stay
            asyncio.run_coroutine_threadsafe(self._taskset.stop(), event_loop()).result(timeout=10)


@lru_cache(maxsize=8)
def _loaded_of(key: str, task: Verifiers) -> _Loaded:
    return _Loaded(task)


def _loaded(task: Verifiers) -> _Loaded:
    return _loaded_of(repr(task), task)


def _tasks(task: Verifiers, n: int | None = None) -> Sequence[Any]:
    loaded = _loaded(task)
    return loaded.first(n if loaded.endless else None)


def _opening(data: Any) -> tuple[Message, ...]:
    """What a task says first, as far as its data tell; where its user opens the conversation, that is not known."""
    system = [message("system", data.system_prompt)] if data.system_prompt else []
    if isinstance(data.prompt, str):
        said = [message("user", data.prompt)]
    elif data.prompt:
        said = [message(m.role, m.content if isinstance(m.content, str) else "") for m in data.prompt]
    else:
        said = [message("user", data.description or data.name or f"task {data.idx}")]
    return (*system, *said)


class _Episode:
    def __init__(self, task: Verifiers, problem: Problem) -> None:
        self._loaded = _loaded(task)
        index = problem.data["index"]
        self._task = _tasks(task, index + 1)[index]
        self._heard: list[Message] = []
        self._tools = False
        self._conversation: Any = None
        self._playing: Future[Any] | None = None

    def reset(self) -> Observation:
        serving = self._loaded.serving
        self._conversation = self._loaded.bridge.Conversation()
        self._playing = asyncio.run_coroutine_threadsafe(serving.play(self._task, self._conversation), event_loop())
        asked = self._conversation.asked.get()
        if isinstance(asked, self._loaded.bridge.Over):
            raise RuntimeError(one_line(asked.error or "the episode ended before the model was asked")[:300])
        self._heard = [_as_message(m) for m in asked.messages]
        self._tools = bool(asked.tools)
        return Observation(tuple(self._heard), tuple(asked.tools))

    def step(self, turn: Turn) -> StepResult:
        read = turn.tool_calls if self._tools else ()
        calls = [call for call in read if isinstance(call, Call)]
        said = self._loaded.bridge.Answer(
            turn.text, [(c.name, c.arguments) for c in calls], turn.finish_reason == "length"
        )
        event_loop().call_soon_threadsafe(self._conversation.answers.put_nowait, said)
        asked = self._conversation.asked.get()
        told, failed = tuple(c.as_message for c in calls), len(read) - len(calls)
        if not isinstance(asked, self._loaded.bridge.Over):
            return StepResult(self._news(asked, turn), calls=told, failed_calls=failed)
        if asked.error is not None:
            raise RuntimeError(one_line(asked.error)[:300])
        return StepResult(reward=asked.reward, done=True, calls=told, failed_calls=failed)

    def _news(self, asked: Any, turn: Turn) -> tuple[Message, ...]:
        """The messages behind the model's turn.

        Raises:
            RuntimeError: something before them is not what it was.
        """
        messages = [_as_message(m) for m in asked.messages]
        n = len(self._heard)
        before = [{k: m[k] for k in ("role", "content")} for m in [*self._heard, message("assistant", turn.text)]]
        if [{k: m[k] for k in ("role", "content")} for m in messages[: n + 1]] != before:
            raise RuntimeError("the taskset rewrote the conversation, which drpo does not train on")
        news = tuple(messages[n + 1 :])
        if not news or any(m["role"] not in ("user", "tool") for m in news):
            raise RuntimeError("the taskset asks the model again without a new message of a user or a tool")
        self._heard = messages
        return news

    def close(self) -> None:
        if self._playing is not None:
            self._playing.cancel()


def _as_message(wire: Mapping[str, Any]) -> Message:
    content = wire.get("content")
    if content is not None and not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise RuntimeError("the taskset shows the model something that is no text")
        content = "".join(part["text"] for part in content)
    told = {"role": wire["role"], "content": content or ""}
    if wire.get("tool_calls"):
        told["tool_calls"] = [_as_call(call["function"]) for call in wire["tool_calls"]]
    return told | ({"name": wire["name"]} if wire["role"] == "tool" and wire.get("name") else {})


def _as_call(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return Call(function["name"], json.loads(function["arguments"] or "{}")).as_message
