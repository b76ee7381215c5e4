"""Conversations to imitate, from rows of messages, or of prompts and completions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo.errors import InputError
from drpo.tasks.rows import Row, is_file, read_rows
from drpo.types import Message
from drpo.types.environment import ToolSchema
from drpo.types.problem import message

FORMS = '{"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "completion": ...}'
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """A conversation in which the assistant speaks at least once, after somebody else.

    Args:
        where: its place in the data: file and line.
        messages: of it.
        tools: schemas of the tools that it shows the model.
    """

    where: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()


def read_conversations(source: str, split: str = "train") -> list[Conversation]:
    """Read every row of a file, a folder or a hub dataset as a conversation.

    A row has "messages", or "prompt" and "completion", each a text or messages, as in TRL; and perhaps "tools".

    Args:
        source: as for `drpo.tasks.rows.read_rows`.
        split: of a folder or hub dataset.

    Raises:
        InputError: a row is no conversation; the message names file, line and what is wrong.
    """
    rows = read_rows(source, split)
    if not rows:
        raise InputError(f"{source}: no rows; each is {FORMS}")
    return [conversation(row, where) for row, where in zip(rows, _places(source, len(rows)), strict=True)]


def conversation(row: Row, where: str) -> Conversation:
    """Return a row's conversation.

    Args:
        row: of the data.
        where: its place, for messages.

    Raises:
        InputError: it is none.

    Example:
        >>> conversation({"prompt": "1 + 1?", "completion": "2"}, "my.jsonl line 1").messages
        ({'role': 'user', 'content': '1 + 1?'}, {'role': 'assistant', 'content': '2'})
    """
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", where)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        asked = _said(row["prompt"], "prompt", "user", where)
        messages = (*asked, *_said(row["completion"], "completion", "assistant", where))
    elif empty := [name for name in ("messages", "prompt", "completion") if name in row and row[name] is None]:
        raise InputError(f"{where}: nothing in {' and '.join(map(repr, empty))}; a row is {FORMS}")
    else:
        raise InputError(f"{where}: the fields are {', '.join(row) or 'none'}; a row is {FORMS}")
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise InputError(f"{where}: no message is the assistant's, so there is nothing to train on")
    if roles[0] == "assistant":
        raise InputError(f"{where}: the first message is the assistant's; something must come before it")
    return Conversation(where, messages, _tools(row.get("tools"), where))


def _said(value: Any, name: str, role: str, where: str) -> tuple[Message, ...]:
    return (message(role, value),) if isinstance(value, str) else _messages(value, name, where)


def _messages(value: Any, name: str, where: str) -> tuple[Message, ...]:
    """A field's messages, without fields that are None (parquet adds those)."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{where}: {name!r} is no list of messages: {repr(value)[:60]}")
    for i, entry in enumerate(value):
        role = entry.get("role") if isinstance(entry, Mapping) else None
        if not isinstance(role, str):
            raise InputError(f"{where}: {name}.{i} is no message with role and content: {repr(entry)[:60]}")
        if role not in ROLES:
            raise InputError(f"{where}: {name}.{i}.role is {role!r}; known: {', '.join(ROLES)}")
        content = entry.get("content")
        if not isinstance(content, str) and not (content is None and entry.get("tool_calls")):
            raise InputError(f"{where}: {name}.{i}.content is no text: {repr(content)[:60]}")
    return tuple({"content": "", **{k: v for k, v in entry.items() if v is not None}} for entry in value)


def _tools(value: Any, where: str) -> tuple[ToolSchema, ...]:
    """The schemas of tools: a list, or its JSON, as data sets of one type per column have it."""
    try:
        listed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{where}: tools is not JSON: {error}") from None
    if listed is None:
        return ()
    if not isinstance(listed, list) or not all(isinstance(tool, Mapping) for tool in listed):
        raise InputError(f"{where}: tools is no list of schemas: {repr(value)[:60]}")
    return tuple(listed)


def _places(source: str, n: int) -> list[str]:
    """Where each row stands: its line in a file of JSON lines, which may have empty ones; else its number."""
    path = Path(source).expanduser()
    if is_file(source) and path.suffix not in (".parquet", ".csv"):
        lines = [i for i, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()]
        if len(lines) == n:
            return [f"{source} line {i}" for i in lines]
    return [f"{source} row {i}" for i in range(1, n + 1)]
