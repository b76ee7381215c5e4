"""What the commands of the benchmarks share: bad input is one line and status 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from drpo.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise InputError(message)


def status(name: str, run: Callable[[], int], interrupted: str = "") -> int:
    """Run a command.

    Args:
        name: of the command, before its lines.
        run: returns the exit status.
        interrupted: what is said besides where it is interrupted.

    Returns:
        The exit status: that of `run`, 2 bad input, 130 interrupted.
    """
    try:
        return run()
    except InputError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted{interrupted}", file=sys.stderr)
        return 130
