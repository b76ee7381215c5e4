"""Standard output and standard error that do not end a run when they fail; which of Python's warnings are shown."""

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from drpo.errors import one_line

_LIBRARIES = (Path(os.__file__).parent, Path(__file__).parents[1])
_ABOUT_THE_MACHINE = ("torch", "cuda")
"""The folder of torch's warnings about a GPU that it cannot use."""


class OutputLostError(Exception):
    """Standard output failed, in a command whose only purpose is its output.

    Args:
        error: the stream's error.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(reason(error))
        self.closed = isinstance(error, BrokenPipeError)


def reason(error: Exception) -> str:
    """Return the system's text of an error, without its number."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


class Stream:
    """A stream that reports its first failure and then discards its output.

    Args:
        stream: the stream.
        lost: receives the first failure, and may raise.
    """

    def __init__(self, stream: TextIO, lost: Callable[[Exception], None]) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        """Write what can be written."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write what can be written."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush what can be flushed."""
        self._try(self._stream.flush)

    def _try(self, do: Callable[[], object]) -> None:
        try:
            do()
        except (OSError, ValueError) as error:  # ValueError: closed
            # The buffered rest must not fail again at exit.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def telling(goes_on: bool) -> Iterator[None]:
    """Protect the block from streams that are closed, full or cannot encode a character.

    Args:
        goes_on: the command continues without its output; a line on standard error reports the loss.

    Raises:
        OutputLostError: standard output failed, and `goes_on` is False.
    """
    before = sys.stdout, sys.stderr
    _open_missing()
    out, err = (_lenient(stream) for stream in (sys.stdout, sys.stderr))
    sys.stderr = cast(TextIO, Stream(err, lambda error: None))
    sys.stdout = cast(TextIO, Stream(out, _say if goes_on else _give_up))
    try:
        yield
    finally:
        with suppress(OutputLostError):  # --help ends the process itself
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def fewer_warnings() -> Iterator[None]:
    """Show, of Python's warnings, those of the user's own code and those about the GPU, in one line each.

    The others are for the developers of libraries. `python -W` and PYTHONWARNINGS have all shown in Python's form.
    """
    if sys.warnoptions:
        yield
        return
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    if _concerns_user(Path(filename)):
        print(f"{category.__name__}: {one_line(message)} ({one_line(filename)}:{lineno})", file=sys.stderr)


def _concerns_user(file: Path) -> bool:
    """Whether a warning from this file concerns the user: it is no library's, or the one that knows the GPU."""
    is_installed = bool({"site-packages", "dist-packages"} & set(file.parts)) or file.name.startswith("<")
    is_library = is_installed or any(file.is_relative_to(folder) for folder in _LIBRARIES)
    return not is_library or file.parts[-3:-1] == _ABOUT_THE_MACHINE


def _open_missing() -> None:
    """Point streams that the shell closed (`>&-`) to the null device; else the next opened file gets their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free descriptor is this stream
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _lenient(stream: TextIO) -> TextIO:
    """Make a stream write "?" for characters that it cannot encode."""
    if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def _say(error: Exception) -> None:
    print(f"drpo: standard output is lost ({reason(error)}); the work goes on without it", file=sys.stderr, flush=True)


def _give_up(error: Exception) -> None:
    raise OutputLostError(error)
