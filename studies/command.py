"""Shared by the scripts of this folder: invalid input gives one line and exit status 2."""

import sys
from collections.abc import Callable, Sequence

from drpo.errors import InputError, one_line


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a script's command and return its exit status: 2 for bad input, 130 where Ctrl-C ended it.

    Args:
        command: receives the arguments and returns the exit status.
        arguments: None takes the process's own.
    """
    try:
        return command(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        print(one_line(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
