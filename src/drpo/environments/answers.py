"""What environments return: checked, and as records that travel between processes.

An answer that a chat template, a tokenizer or an advantage could stumble over is a `Failure` of its environment.
"""

import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias, TypeGuard

import numpy as np

from drpo.types import Failure, Message
from drpo.types.environment import Observation, StepResult
from drpo.types.problem import is_reward, not_a_reward

Answer: TypeAlias = Observation | StepResult
MOST_CHARACTERS = 1_000_000
"""Of the messages of an answer, and of its tools or calls, as JSON."""
_DEEPEST = 64
"""So many lists and mappings may stand within one another: what reads them later goes one deeper for each."""
_MOST_FAILED_CALLS = 1_000_000

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
        return Observation(messages, _tools(value.tools))
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
        if type(value.failed_calls) is not int or not 0 <= value.failed_calls <= _MOST_FAILED_CALLS:
            shown = _shown(value.failed_calls)
            _refuse(f"step returned failed_calls={shown}, not an integer of at least 0, and at most a million")
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
        if not isinstance(message.get("name"), str | None):
            _refuse(f"{method} returned a message whose name is {_shown(message['name'])}, not a text")
        calls = message.get("tool_calls")
        if calls is not None and not _are_mappings(calls):
            _refuse(f"{method} returned a message whose tool_calls are {_shown(calls)}, not mappings")
    return plain


def _tools(tools: object) -> tuple[Mapping[str, Any], ...]:
    plain = _plain("reset", "tools", tools)
    for tool in plain:
        match tool:
            case {"function": {"name": str()}}:
                continue
        _refuse(f'reset returned the tool {_shown(tool)}; it is {{"type": "function", "function": {{"name": ...}}}}')
    return plain


def _plain(method: str, name: str, mappings: object) -> tuple[Mapping[str, Any], ...]:
    """Return mappings as JSON keeps them, each half of a character replaced: tokenizers cannot encode it.

    A whole number beyond 64 bits, which a model may write in a call, is kept as a text: records hold none.
    """
    if not _are_mappings(mappings):
        _refuse(f"{method} returned {name}={_shown(mappings)}, not a tuple of mappings")
    try:
        text = json.dumps([dict(mapping) for mapping in mappings], ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(f"{method} returned {name} that are not JSON: {' '.join(str(error).split())[:100]}")
    if len(text) > MOST_CHARACTERS:
        _refuse(f"{method} returned {name} of {len(text):,} characters; at most {MOST_CHARACTERS:,}")
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    plain = json.loads(whole, parse_int=lambda digits: n if abs(n := int(digits)) < 2**63 else digits)
    if _deeper(plain, _DEEPEST):
        _refuse(f"{method} returned {name} nested too deeply; at most {_DEEPEST} levels")
    return tuple(plain)


def _are_mappings(value: object) -> TypeGuard[Sequence[Mapping[Any, Any]]]:
    return isinstance(value, tuple | list) and all(isinstance(one, Mapping) for one in value)


def _deeper(value: Any, levels: int) -> bool:
    """Whether more lists and mappings than so many stand within one another."""
    if not isinstance(value, list | dict):
        return False
    return levels == 0 or any(_deeper(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value))


def _finite(reward: Any) -> float:
    if not isinstance(reward, numbers.Real | np.bool_):
        _refuse(f"step returned reward={_shown(reward)}, not a number")
    if not is_reward(float(reward)):
        raise _InvalidError(Failure("not_finite", f"step returned reward={not_a_reward(float(reward))}"))
    return float(reward)


def _refuse(text: str) -> NoReturn:
    raise _InvalidError(Failure("not_a_number", text))


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split())[:60]} ({type(value).__name__})"
