"""Files and folders that a command writes: new ones, whole or not at all, and never through a link.

A run's folder may be a stranger's. A link in it may point at any file of the user's, so a link is replaced or refused,
never followed. What a killed process leaves half written ends in `.writing`.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from drpo.errors import InputError

SCRATCH = ".writing"
"""End of the name of a file or folder that is not yet whole."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that takes the place of `path` when it is written; on any failure nothing changes.

    A link at `path` is replaced, and its target left alone. A name of the kernel's, as /dev/stdout, is written to.

    Args:
        path: of the file, in a folder that is there.

    Raises:
        InputError: what stands at `path` is no file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as file:
        ...         _ = file.write(b"whole")
        ...     [p.name for p in Path(folder).iterdir()]
        ['a.txt']
    """
    if is_stream(path):
        with path.open("wb") as stream:
            yield stream
        return
    if path.exists() and not path.is_symlink() and not path.is_file():
        raise InputError(f"{path}: cannot be written, what is there is no file; name another")
    scratch = _beside(path)
    try:
        with naming(path), open(scratch, "x+b", opener=opened_here) as file:
            yield file
        scratch.replace(path)
    except BaseException:  # a full disk among others: what is half written takes the room that is lacking
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what the system refuses inside say of which file or folder: of a write it does not, as on a full disk.

    Libraries written in Rust raise errors of their own, which have the system's number in their words alone.

    Args:
        path: that is written.

    Raises:
        OSError: in place of theirs too.

    Example:
        >>> try:
        ...     with naming(Path("a.txt")):
        ...         raise OSError(28, "No space left on device")
        ... except OSError as error:
        ...     error.filename
        'a.txt'
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def is_stream(path: Path) -> bool:
    """Whether the kernel gives a stream this name, as /dev/stdout or /dev/fd/63, which must stay what it is."""
    parent = str(path.parent.resolve())
    return (parent == "/dev" or parent.startswith("/proc/")) and path.exists() and not path.is_dir()


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `path` when it is filled; on any failure nothing changes.

    Args:
        path: of the folder. What stands there is removed; of a link, the link alone.
    """
    scratch = _beside(path)
    scratch.mkdir()
    try:
        yield scratch
        remove(path)
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def require_plain(path: str | Path) -> None:
    """Refuse a file to be written to that is a link, hard ones too, or no file; one that is not there is plain.

    Raises:
        InputError: it is.
    """
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not S_ISREG(found.st_mode):
            raise InputError(f"{path} is a link or no plain file, and nothing is written through those; remove it")
        if found.st_nlink > 1:
            raise InputError(
                f"{path} has {found.st_nlink} names (hard links), and nothing is written through those; "
                "put a copy in its place"
            )


def opened_here(path: str, flags: int) -> int:
    """Open a file that is no link, for `open(..., opener=opened_here)`: one that grows, or is locked.

    Raises:
        InputError: it is a link, or no file.
    """
    require_plain(path)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # opening a pipe would wait for its reader


def truncate(path: Path, size: int) -> None:
    """Cut a file that is no link to `size` bytes."""
    with naming(path), open(path, "r+b", opener=opened_here) as file:
        file.truncate(size)


def require_own(folder: Path) -> None:
    """Refuse to write into a folder that is a link: what it leads to belongs to nobody knows whom.

    Raises:
        InputError: it is a link.
    """
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a link to {os.readlink(folder)}, and nothing is written through links inside a run; "
            "put the folder itself there, or link the whole run"
        )


def remove(path: Path) -> None:
    """Remove a file or a folder; of a link, the link alone. One that is not there is as good as removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of matplotlib's, of the kind that the file's name ends in.

    Args:
        figure: to be drawn.
        path: of the picture.
        options: of `Figure.savefig`.
    """
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=130, **options)


def _beside(path: Path) -> Path:
    """A name that nobody can know beforehand, in the same folder."""
    return path.with_name(f".{secrets.token_hex(8)}{SCRATCH}")
