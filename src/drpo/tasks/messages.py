"""Prompts that are lists of messages, as in the data sets of TRL and verl."""

from collections.abc import Mapping, Sequence
from typing import Any

from drpo.errors import InputError
from drpo.types import Message


def read_messages(value: Sequence[Any], name: str, where: str) -> tuple[Message, ...]:
    """Return a field's messages, without fields that are None (parquet adds those).

    Args:
        value: the field's value.
        name: of the field, for error messages.
        where: the row, for error messages.

    Returns:
        One message or more: a system message, if any, first; the last is the user's.

    Raises:
        InputError: not such a list.

    Example:
        >>> read_messages([{"role": "user", "content": "1 + 1?", "name": None}], "prompt", "row 1")
        ({'role': 'user', 'content': '1 + 1?'},)
    """
    for i, entry in enumerate(value):
        if not (isinstance(entry, Mapping) and isinstance(entry.get("role"), str)):
            raise InputError(f"{where}: {name}.{i} is no message with role and content: {repr(entry)[:60]}")
        if not (isinstance(entry.get("content"), str) or entry.get("tool_calls")):
            raise InputError(f"{where}: {name}.{i}.content is no text: {repr(entry.get('content'))[:60]}")
    messages = tuple({k: v for k, v in entry.items() if v is not None} for entry in value)
    if not messages:
        raise InputError(f"{where}: {name!r} has no message; a prompt ends with the user's")
    last = messages[-1]["role"]
    if last != "user":
        raise InputError(f"{where}: the last message of {name!r} is {last}'s; a prompt ends with the user's")
    if any(m["role"] == "system" for m in messages[1:]):
        raise InputError(f"{where}: {name!r} has a system message that is not the first")
    return messages


def conversation_text(messages: Sequence[Message]) -> str:
    """Return the text of the messages without the system message, to compare questions by.

    Example:
        >>> conversation_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1? "}])
        '1 + 1?'
    """
    return "\n\n".join(str(m.get("content", "")) for m in messages if m["role"] != "system").strip()
