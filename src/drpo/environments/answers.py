"""What environments return: checked, and as records that travel between processes.

An answer that a chat template, a tokenizer or an advantage could stumble over is a `Failure` of its environment.
"""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import numpy as np

from drpo.types import Failure, Message
from drpo.types.environment import Observation, StepResult

Answer: TypeAlias = Observation | StepResult
MOST_CHARACTERS = 1_000_000
"""Of the messages of an answer, and of its tools or calls, as JSON."""

_FIRST, _REPLIES = ("system", "user", "assistant", "tool"), ("user", "tool")


class _InvalidError(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def checked_observation(value: object) -> Observation | Failure:
    """Return what `Environment.reset` returned, of plain JSON values, or why it is no observation.

    Args:
        value: an `Observation` of at least one message, each with a role and a text.

    Example:
        >>> checked_observation(Observation(({"role": "user", "content": "1 + 1?"},))).messages
        ({'role': 'user', 'content': '1 + 1?'},)
        >>> checked_observation("1 + 1?").text
        "reset returned '1 + 1?' (str), not an Observation"
    """
    try:
        if not isinstance(value, Observation):
            _refuse(f"reset returned {_shown(value)}, not an Observation")
        messages = _messages("reset", value.messages, _FIRST)
        if not messages:
            _refuse("reset returned no message")
        return Observation(messages, _plain("reset", "tools", value.tools))
    except _InvalidError as error:
        return error.failure


def checked_result(value: object) -> StepResult | Failure:
    """Return what `Environment.step` returned, of plain JSON values, or why it is no result.

    Args:
        value: a `StepResult` whose messages are texts of users and tools, at least one unless the episode is done, and
            whose reward is finite.

    Example:
        >>> checked_result(StepResult(reward=True, done=True))
        StepResult(messages=(), reward=1.0, done=True, calls=(), failed_calls=0)
        >>> checked_result(StepResult(({"role": "system", "content": "obey"},))).text
        "step returned a message of role 'system' (str); it may be user, tool"
    """
    try:
        if not isinstance(value, StepResult):
            _refuse(f"step returned {_shown(value)}, not a StepResult")
        messages = _messages("step", value.messages, _REPLIES)
        done: Any = value.done
        if not isinstance(done, bool | np.bool_):
            _refuse(f"step returned done={_shown(done)}, not a bool")
        if not (done or messages):
            _refuse("step returned no message, and the episode is not done")
        if type(value.failed_calls) is not int or value.failed_calls < 0:
            _refuse(f"step returned failed_calls={_shown(value.failed_calls)}, not an integer of at least 0")
        calls = _plain("step", "calls", value.calls)
        return StepResult(messages, _finite(value.reward), bool(done), calls, value.failed_calls)
    except _InvalidError as error:
        return error.failure


def to_record(answer: Answer | Failure) -> dict[str, Any]:
    """Return an answer as JSON values, for `of_record`."""
    return {type(answer).__name__: dict(vars(answer))}


def of_record(record: Mapping[str, Any]) -> Answer | Failure:
    """Return the answer of a record, checked again.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    if "Failure" in record:
        return Failure(**record["Failure"])
    if "Observation" in record:
        return checked_observation(Observation(**_tuples(record["Observation"])))
    return checked_result(StepResult(**_tuples(record["StepResult"])))


def same(one: Answer, other: Answer) -> bool:
    """Whether two checked answers say the same; NaN, which a call's arguments may hold, is equal to itself."""
    return json.dumps(to_record(one)) == json.dumps(to_record(other))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _messages(method: str, messages: object, roles: tuple[str, ...]) -> tuple[Message, ...]:
    plain = _plain(method, "messages", messages)
    for message in plain:
        if message.get("role") not in roles:
            _refuse(f"{method} returned a message of role {_shown(message.get('role'))}; it may be {', '.join(roles)}")
        if not isinstance(message.get("content"), str):
            _refuse(f"{method} returned a message whose content is {_shown(message.get('content'))}, not a text")
    return plain


def _plain(method: str, name: str, mappings: object) -> tuple[Mapping[str, Any], ...]:
    """Return mappings as JSON keeps them, each half of a character replaced: tokenizers cannot encode it."""
    if not (isinstance(mappings, tuple | list) and all(isinstance(mapping, Mapping) for mapping in mappings)):
        _refuse(f"{method} returned {name}={_shown(mappings)}, not a tuple of mappings")
    try:
        text = json.dumps([dict(mapping) for mapping in mappings], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(f"{method} returned {name} that are not JSON: {' '.join(str(error).split())[:100]}")
    if len(text) > MOST_CHARACTERS:
        _refuse(f"{method} returned {name} of {len(text):,} characters; at most {MOST_CHARACTERS:,}")
    return tuple(json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")))


def _finite(reward: Any) -> float:
    if not isinstance(reward, numbers.Real | np.bool_):
        _refuse(f"step returned reward={_shown(reward)}, not a number")
    if not math.isfinite(float(reward)):
        raise _InvalidError(Failure("not_finite", f"step returned reward={float(reward)}"))
    return float(reward)


def _refuse(text: str) -> NoReturn:
    raise _InvalidError(Failure("not_a_number", text))


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split())[:60]} ({type(value).__name__})"
