"""Standard output and standard error: what they cannot take must not end what is worth more."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class OutputLostError(Exception):
    """Standard output takes no more, of a command that has nothing to do but to write to it.

    Args:
        error: what it said.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(reason(error))
        self.closed = isinstance(error, BrokenPipeError)


def reason(error: Exception) -> str:
    """Return what the system says of an error, without its number."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


class Stream:
    """A stream whose first failure is handed on; from then on it leads nowhere.

    Args:
        stream: takes the text while it can.
        lost: is told of the failure, and may raise.
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
        except (OSError, ValueError) as error:  # ValueError: it is closed
            # What still waits in its buffer must not fail again when the process ends.
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def telling(goes_on: bool) -> Iterator[None]:
    """While entered, no text ends the command because a stream is closed, full, gone or knows no such letter.

    Args:
        goes_on: what the command does is worth doing without its output: a line on standard error says that it is lost.

    Raises:
        OutputLostError: standard output is lost, of a command that does not go on without it.
    """
    before = sys.stdout, sys.stderr
    _open_missing()
    out, err = (_lenient(stream) for stream in (sys.stdout, sys.stderr))
    sys.stderr = cast(TextIO, Stream(err, lambda error: None))
    sys.stdout = cast(TextIO, Stream(out, _say if goes_on else _give_up))
    try:
        yield
    finally:
        with suppress(OutputLostError):  # of --help, which ends the process by itself
            sys.stdout.flush()
        sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """Lead streams that the shell closed (`>&-`) nowhere: else the next file to be opened would get their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _lenient(stream: TextIO) -> TextIO:
    """The same stream, which writes "?" for letters that its encoding does not have."""
    if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
    return stream


def _say(error: Exception) -> None:
    print(f"drpo: standard output is lost ({reason(error)}); the work goes on without it", file=sys.stderr, flush=True)


def _give_up(error: Exception) -> None:
    raise OutputLostError(error)
