"""Writes files and folders atomically, and never through a link.

A run's folder may come from someone else, and a link in it may point at any of the user's files. So links are replaced
or rejected, never followed. Incomplete files of a killed process end in `.writing`.
"""

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from drpo.errors import InputError

SCRATCH = ".writing"
"""Suffix of incomplete files and folders."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `path` at the end of the block; on any failure nothing changes.

    A link at `path` is replaced; its target is not touched. A stream, such as /dev/stdout, is written to directly.

    Args:
        path: of the file, in an existing folder.

    Raises:
        InputError: `path` exists and is not a file.

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
        raise InputError(f"{path}: cannot be written, because it is not a file; name another")
    scratch = _beside(path)
    try:
        with naming(path), open(scratch, "x+b", opener=opened_here) as file:
            yield file
        scratch.replace(path)
    except BaseException:  # also on a full disk, where the partial file takes space
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an `OSError` raised inside that lacks one, as for a write to a full disk.

    Errors of Rust libraries, which contain the system's error number only in their text, become an `OSError` too.

    Args:
        path: the file or folder that is written.

    Raises:
        OSError: with the path.

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
    """Whether a path is a stream of the kernel, such as /dev/stdout or /dev/fd/63, which must not be replaced."""
    parent = str(path.parent.resolve())
    return (parent == "/dev" or parent.startswith("/proc/")) and path.exists() and not path.is_dir()


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def require_plain(path: str | Path) -> None:
    """Raise if a path exists and is a symbolic link, has several hard links, or is not a regular file.

    Raises:
        InputError: as above.
    """
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        if not S_ISREG(status.st_mode):
            raise InputError(f"{path} is a link or no plain file, and nothing is written through those; remove it")
        if status.st_nlink > 1:
            raise InputError(
                f"{path} has {status.st_nlink} names (hard links), and nothing is written through those; "
                "put a copy in its place"
            )


def opened_here(path: str, flags: int) -> int:
    """Open a file without following links, for `open(..., opener=opened_here)`: to append to it or lock it.

    Raises:
        InputError: the path is a link or not a file.
    """
    require_plain(path)
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # else opening a pipe would wait for a reader


def set_usual_mode(path: Path) -> None:
    """Give a file the mode that `open` would have, by the umask: safetensors makes files that the owner alone reads.

    Args:
        path: of the file, in a folder that may be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made, usual = Path(folder) / "made", Path(folder) / "usual"
        ...     os.close(os.open(made, os.O_CREAT, 0o600))
        ...     usual.touch()
        ...     set_usual_mode(made)
        ...     made.stat().st_mode == usual.stat().st_mode
        True
    """
    scratch = _beside(path)
    scratch.touch(exist_ok=False)
    path.chmod(scratch.stat().st_mode & 0o777)
    scratch.unlink()


def truncate(path: Path, size: int) -> None:
    """Truncate a file to `size` bytes; raises if it is a link."""
    with naming(path), open(path, "r+b", opener=opened_here) as file:
        file.truncate(size)


def require_own(folder: Path) -> None:
    """Raise if a folder is a link: its target may belong to anyone.

    Raises:
        InputError: the folder is a link.
    """
    if folder.is_symlink():
        raise InputError(
            f"{folder} is a link to {os.readlink(folder)}, and nothing is written through links inside a run; "
            "put the folder itself there, or link the whole run"
        )


def remove(path: Path) -> None:
    """Remove a file or a folder; of a link, only the link. A missing path is accepted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a matplotlib figure in the format of the path's suffix.

    Args:
        figure: the figure.
        path: of the picture.
        options: of `Figure.savefig`.
    """
    with replacing(path) as file, warnings.catch_warnings():
        # A letter that the font lacks is warned of as it is, and a name in a record may hold control characters.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=130, **options)


def _beside(path: Path) -> Path:
    """Return an unpredictable name in the same folder."""
    return path.with_name(f".{secrets.token_hex(8)}{SCRATCH}")
