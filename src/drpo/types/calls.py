"""Calls of tools, and their plain form: JSON in tags."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Args:
        name: of the tool.
        arguments: by name.
    """

    name: str
    arguments: Mapping[str, Any]

    @property
    def as_message(self) -> Mapping[str, Any]:
        """The call as chat templates read it in an assistant's `tool_calls`."""
        return {"type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


@dataclass(frozen=True)
class MalformedCall:
    """Something that was meant as a call.

    Args:
        reason: why it is none, for the model to learn from.
    """

    reason: str


def read_calls(text: str) -> list[Call | MalformedCall]:
    """Return the calls that a text holds, each as JSON between <tool_call> and </tool_call>, in order.

    Args:
        text: {"name": "search", "arguments": {"query": "..."}} in tags, with any text around.

    Example:
        >>> read_calls('Let me see. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
        [Call(name='add', arguments={'a': 1})]
        >>> read_calls("<tool_call>add(1)</tool_call>")[0].reason
        'the call is not JSON: Expecting value at character 0'
        >>> read_calls("The answer is 3.")
        []
    """
    return [_read(body) for body in _TAGGED.findall(text)]


def without_calls(text: str) -> str:
    """Return a text without its <tool_call> tags and their contents.

    Example:
        >>> without_calls("Let me see. <tool_call>...</tool_call>")
        'Let me see.'
    """
    return _TAGGED.sub("", text).strip()


def _read(body: str) -> Call | MalformedCall:
    try:
        record = json.loads(body)
    except json.JSONDecodeError as error:
        return MalformedCall(f"the call is not JSON: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError):
        return MalformedCall("the call is not JSON that can be read")
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return MalformedCall('a call is {"name": ..., "arguments": {...}}')
    arguments = record.get("arguments", {})
    if not isinstance(arguments, dict):
        return MalformedCall(f"the arguments of {record['name']} must be an object: {{name: value}}")
    return Call(record["name"], arguments)
