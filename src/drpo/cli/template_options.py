"""A chat template and its arguments on the command line: `--chat-template FILE` and `--template.NAME VALUE`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drpo.errors import InputError

PREFIX = "--template."


def read_template(file: Path) -> str:
    """Return the text of a chat template's file.

    Raises:
        InputError: the file cannot be read, or holds no template.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"--chat-template {file}: {reason}; name a file with a Jinja template") from None
    if "{" not in text:
        raise InputError(f"--chat-template {file}: it is no Jinja template: it has no {{")
    return text


def split_template(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split the arguments of a chat template from a command line.

    Args:
        arguments: of the command line.

    Returns:
        The values by name, as JSON where they are JSON and else as text; and the other arguments.

    Raises:
        InputError: a value is missing, or a name is none.

    Example:
        >>> split_template(["--template.enable-thinking", "false", "--steps", "2", "--template.date=1 May"])
        ({'enable_thinking': False, 'date': '1 May'}, ['--steps', '2'])
    """
    values: dict[str, Any] = {}
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(PREFIX):
            others.append(argument)
            continue
        option, joined, value = argument.partition("=")
        if not joined:
            value = next(rest, "--")
        name = option.removeprefix(PREFIX).replace("-", "_")
        if not name.isidentifier():
            raise InputError(f"{option}: {name!r} is no name of an argument; write it as --template.enable-thinking")
        if not joined and value.startswith("--"):
            raise InputError(f"{option}: a value is missing; it takes true, false, a number, other JSON, or text")
        values[name] = _value(value)
    return values, others


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str)  # NaN and Infinity are text
    except (ValueError, RecursionError):
        return text
