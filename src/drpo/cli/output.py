"""Where a command writes: tried before anything is computed, refused in one line; a picture that fails is a warning."""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from tempfile import TemporaryFile

from drpo.errors import InputError
from drpo.files import is_stream

log = logging.getLogger("drpo")

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
"""Endings of the pictures that a command can draw."""


@contextmanager
def writing_folder(option: str, folder: Path) -> Iterator[None]:
    """Make a folder, or refuse it; it is removed again where nothing has come of it.

    Args:
        option: that names it, for the message.
        folder: to write into; those above it are made too.

    Raises:
        InputError: nothing can be written there.
    """
    with refusing(f"{option} {folder}", "name a folder that can be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        _try_in(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def require_file(option: str, path: Path, endings: Collection[str] = ()) -> None:
    """Refuse a file that cannot be written; nothing is left of the attempt.

    Args:
        option: that names it, for the message.
        path: of the file, in a folder that is there; one that is there already stays as it is.
        endings: those that the file's name may have; none for any.

    Raises:
        InputError: it has another ending, or cannot be written.
    """
    if endings and path.suffix.lower() not in endings:
        raise InputError(f"{option} {path}: no kind of picture that can be drawn; end it in {', '.join(endings)}")
    with refusing(f"{option} {path}", "name a file in a folder that is there"):
        if is_stream(path):
            return
        _try_in(path.parent)
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
        if not (S_ISREG(mode) or S_ISDIR(mode) or S_ISLNK(mode)):  # opening a pipe would wait for its reader
            raise OSError("what is there is no file")
        if not S_ISLNK(mode):  # a link is replaced
            path.open("ab").close()


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Turn what the operating system says against a path into one line.

    Args:
        what: cannot be written, as the user gave it.
        advice: what to do about it.

    Raises:
        InputError: in place of the system's error.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        known = isinstance(error, OSError) and error.strerror
        reason = "a file is there" if isinstance(error, FileExistsError) else known or str(error)
        raise InputError(f"{what}: cannot be written ({reason}); {advice}") from None


def attempt(what: str, folder: Path, write: Callable[[], Path]) -> Path | None:
    """Draw or write what shows a result, or warn in one line: it must not make fail what is done.

    Args:
        what: it is, in a word.
        folder: what it is of.
        write: writes it and returns its path.
    """
    try:
        return write()
    except Exception as error:
        log.warning("no %s (%s: %s); try: drpo report %s", what, type(error).__name__, error, folder)
        return None


def _try_in(folder: Path) -> None:
    with TemporaryFile(dir=folder):
        pass
