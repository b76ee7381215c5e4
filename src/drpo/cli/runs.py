"""Checks that a folder holds a run, and reports invalid records in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drpo.errors import InputError
from drpo.train.records import CONFIG, TRIALS, refuse_old_comparison, refuse_part


def require_run(folder: Path) -> None:
    """Raise unless a folder holds a run or a comparison, or is empty.

    Raises:
        InputError: no such folder, or it holds something else.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no run there, no such folder; a run makes its own as it begins")
    refuse_part(folder)
    refuse_old_comparison(folder, os.listdir(folder))
    begun = (folder / CONFIG).exists() or (folder / TRIALS).is_dir()
    if not begun and any(folder.iterdir()):
        raise InputError(f"{folder}: no run there ({CONFIG} is missing), nor a comparison's {TRIALS}")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn an error caused by invalid records into one line.

    Args:
        folder: the folder, for the message.

    Raises:
        InputError: in place of the reader's error.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"{folder}: its records cannot be read ({type(error).__name__}: {error})") from None
