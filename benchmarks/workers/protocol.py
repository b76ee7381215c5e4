"""How a competitor talks with the harness: a JSON object a line, in on stdin, out on stdout. Standard library only."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]
Repetition: TypeAlias = Callable[[Mapping[str, Any]], Record]


class Channel:
    """The worker's end of the line; whatever else is printed in this process goes to stderr from here on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        # Libraries, their C++ too, print to file descriptor 1.
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def receive(self) -> Record | None:
        """Return the next object, or None where the harness has closed the line."""
        line = sys.stdin.readline()
        if not line.strip():
            return None
        record: Record = json.loads(line)
        return record

    def answer(self, record: Mapping[str, Any]) -> None:
        """Send an object."""
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()


def one_line(error: BaseException) -> str:
    """Return an error's kind and message in one line.

    Args:
        error: any.

    Returns:
        "Kind: message", at most 300 characters.
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def serve(prepare: Callable[[Mapping[str, Any]], tuple[Record, Repetition]]) -> None:
    """Read the setup, prepare, say what was prepared, then answer every request with one repetition, to the end.

    A repetition that raises is answered with its failure; the worker goes on.

    Args:
        prepare: setup -> (what to tell of oneself: versions, settings; the function that runs one repetition).
    """
    channel = Channel()
    setup = channel.receive()
    if setup is None:
        return
    try:
        about, repetition = prepare(setup)
    except Exception as error:
        channel.answer({"failure": one_line(error)})
        raise
    channel.answer({"about": about})
    while (request := channel.receive()) is not None:
        try:
            channel.answer(repetition(request))
        except Exception as error:
            channel.answer({"failure": one_line(error)})
