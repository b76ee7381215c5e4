"""Environments written for OpenEnv, in this process, without its server (`pip install openenv`)."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from drpo.environments.libraries.imports import environment_class, library
from drpo.environments.libraries.loop import settled
from drpo.environments.libraries.seeded import Answer, Game, SeededTask
from drpo.errors import InputError
from drpo.spec import import_named

_NOT_SHOWN = {"done", "reward", "metadata"}
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class OpenEnv(SeededTask):
    """An environment of OpenEnv by its class: `openenv('my_envs:Echo')`.

    The model reads an observation's own fields: a text alone where there is one field, else JSON. It writes the value
    of the action's one required field as plain text, or its fields as a JSON object, in a fence or not. `render` and
    `parse` name functions that do it otherwise. An action that cannot be read is answered with what is wrong, and earns
    nothing. `reset` gets the problem's seed; the observations' rewards are those of the turns.

    Args:
        name: the class, as `module:Class`; it is made without arguments.
        turns: at most, 1 to 1024.
        system: the system message, or None.
        action: the class of actions, as `module:Class`; None reads it from the class's type arguments,
            `Environment[MyAction, ...]`, or from the annotation of `step`.
        render: observation -> text, as `module:function`; None is the rule above.
        parse: text -> action, as `module:function`; a ValueError tells what is wrong; None is the rule above.

    Raises:
        InputError: OpenEnv is not installed, something that cannot be imported, a value out of its range, an
            environment that does not start.
    """

    action: str | None = None
    render: str | None = None
    parse: str | None = None

    def __post_init__(self) -> None:
        base = library("openenv.core.env_server.interfaces", self.who, "openenv").Environment
        if not issubclass(environment_class(self.name, self.who), base):
            raise InputError(f"{self.who}: {self.name} is no openenv.core.Environment")
        if self.parse is None:
            self._parsed  # noqa: B018 (raises where no class of actions is known)
        self.require()

    def game(self) -> Game:
        """Return a new environment, not yet started."""
        return _OpenEnvGame(environment_class(self.name, self.who)(), self._rendered, self._parsed)

    @property
    def _rendered(self) -> Callable[[Any], str]:
        return default_render if self.render is None else _function(self.render, self.who)

    @property
    def _parsed(self) -> Callable[[str], Any]:
        if self.parse is not None:
            return _function(self.parse, self.who)
        action = environment_class(self.action, self.who) if self.action else self._declared_action()
        return partial(default_parse, action=action)

    def _declared_action(self) -> type[Any]:
        base = library("openenv.core.env_server.types", self.who, "openenv").Action
        found = environment_class(self.name, self.who)
        stated = [a for b in getattr(found, "__orig_bases__", ()) for a in get_args(b)]
        stated += [p.annotation for p in inspect.signature(found.step, eval_str=True).parameters.values()]
        for candidate in stated:
            if isinstance(candidate, type) and issubclass(candidate, base) and candidate is not base:
                return candidate
        raise InputError(f"{self.who}: {self.name} does not say its class of actions; add action='module:Class'")


class _OpenEnvGame:
    def __init__(self, environment: Any, render: Callable[[Any], str], parse: Callable[[str], Any]) -> None:
        self._environment, self._render, self._parse = environment, render, parse

    def reset(self, seed: int) -> str:
        return self._render(settled(self._environment.reset_async(seed=seed)))

    def step(self, action: str) -> Answer:
        try:
            parsed = self._parse(action)
        except ValueError as error:
            return Answer(f"Error: {' '.join(str(error).split())[:500]}", 0.0, False, failed=True)
        observation = settled(self._environment.step_async(parsed))
        return Answer(self._render(observation), float(observation.reward or 0.0), bool(observation.done))

    def close(self) -> None:
        self._environment.close()


def _function(spec: str, task: str) -> Callable[[Any], Any]:
    module, colon, name = spec.partition(":")
    found = import_named(module, name, task) if colon else None
    if not callable(found):
        raise InputError(f"{task}: {spec!r} must name a function, as 'module:function'")
    return found  # type: ignore[no-any-return]


def default_render(observation: Any) -> str:
    """Return what a model reads of an observation: its one field's text, or its fields as JSON."""
    fields = {k: v for k, v in observation.model_dump(mode="json").items() if k not in _NOT_SHOWN}
    texts = list(fields.values())
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else json.dumps(fields, ensure_ascii=False)


def default_parse(text: str, action: type[Any]) -> Any:
    """Return the action that a model wrote: a JSON object of its fields, in a fence or not, or its one field's value.

    Args:
        text: the model's.
        action: a class of OpenEnv's actions, a pydantic model.

    Raises:
        ValueError: neither, or fields that the class refuses.
    """
    fields = [name for name in action.model_fields if name != "metadata"]
    required = [name for name in fields if action.model_fields[name].is_required()] or fields
    fenced = _FENCE.search(text)
    body = (fenced.group(1) if fenced else text).strip()
    try:
        read = json.loads(body)
    except (ValueError, RecursionError):
        read = body
    if isinstance(read, Mapping):
        return _validated(action, read, fields)
    if len(required) != 1:
        raise ValueError(f"write a JSON object with the fields {', '.join(fields)}")
    as_text = action.model_fields[required[0]].annotation is str
    return _validated(action, {required[0]: body if as_text else read}, fields)


def _validated(action: type[Any], values: Mapping[str, Any], fields: Sequence[str]) -> Any:
    try:
        return action.model_validate(values)
    except ValueError as error:
        problems: Any = error  # a pydantic ValidationError
        first = problems.errors()[0]
        where = ".".join(map(str, first["loc"])) or "action"
        raise ValueError(f"{where}: {first['msg']}; the fields are {', '.join(fields)}") from None
