"""Checks that outputs can be written, before anything is computed. A picture that fails is only a warning."""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from tempfile import TemporaryFile

from drpo.errors import InputError, as_typed
from drpo.files import is_stream

log = logging.getLogger("drpo")

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
"""Suffixes of pictures."""


@contextmanager
def writing_folder(option: str, folder: Path) -> Iterator[None]:
    """Create a folder, with its parents; remove it again if it stays empty.

    Args:
        option: the option that names it, for the message.
        folder: the folder to write into.

    Raises:
        InputError: the folder is not writable.
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
    """Raise unless a file can be written; the test leaves no file behind.

    Args:
        option: the option that names it, for the message.
        path: of the file, in an existing folder; an existing file is left unchanged.
        endings: the allowed suffixes; empty allows any.

    Raises:
        InputError: another suffix, or the file is not writable.
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
        if not (S_ISREG(mode) or S_ISDIR(mode) or S_ISLNK(mode)):  # opening a pipe would wait for a reader
            raise OSError("what is there is no file")
        if not S_ISLNK(mode):  # a link is replaced
            path.open("ab").close()


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Turn the operating system's error about a path into one line.

    Args:
        what: the path, as the user gave it.
        advice: the remedy.

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
    """Write a picture or a report; warn in one line if that fails, because the result itself is safe.

    Args:
        what: its name, in a word.
        folder: the folder it describes.
        write: writes it and returns its path.
    """
    try:
        return write()
    except Exception as error:
        log.warning("no %s (%s: %s); try: drpo report %s", what, type(error).__name__, error, as_typed(folder))
        return None


def _try_in(folder: Path) -> None:
    with TemporaryFile(dir=folder):
        pass
