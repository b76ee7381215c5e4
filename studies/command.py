"""Shared by the scripts of this folder: invalid input gives one line and exit status 2, `| head` an end."""

import sys
from collections.abc import Callable, Sequence

from drpo.cli.streams import OutputLostError, telling
from drpo.errors import InputError, one_line


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a script's command and return its exit status: 2 for bad input, 130 after Ctrl-C, 141 where nobody reads on.

    Args:
        command: receives the arguments and returns the exit status.
        arguments: None takes the process's own.
    """
    try:
        with telling(goes_on=False):
            status = command(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
            return status
    except OutputLostError as error:
        return 141 if error.closed else _failed(f"standard output: {error}", 1)
    except InputError as error:
        return _failed(str(error), 2)
    except KeyboardInterrupt:
        return 130


def _failed(message: str, status: int) -> int:
    print(one_line(message), file=sys.stderr)
    return status
