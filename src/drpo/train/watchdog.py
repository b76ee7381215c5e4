"""Ends a process whose work has come to a standstill, and says where it stood."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from drpo.files import opened_here
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run

STALLED, STATUS = "stalled.txt", 75
"""The file in a run's folder, and the exit status (EX_TEMPFAIL: try again)."""

GRACE = 30.0
"""Seconds that Python has to end the process by itself before the interpreter is ended from outside."""


class Watchdog(NullCallback):
    """While entered, ends the process when a phase of a run does not end; it is a callback like any other.

    An engine may hang in code that no exception reaches. The stacks of all threads go to `stalled.txt` in the run's
    folder, one line to stderr, and the process ends with status 75, or does what `then` says. The run's last checkpoint
    is whole, so that `drpo train --resume` does the same step again. Where Python itself is held, the stacks are
    written and the process is ended half a minute later by the interpreter's own watchdog, with status 1.

    Args:
        folder: of the run.
        seconds: that a phase may take; 0 is for ever.
        rank: of several processes; all but the first write to `stalled-RANK.txt`.
        then: is called in a thread of its own; where it returns, the process ends.
    """

    def __init__(self, folder: Path, seconds: float, rank: int = 0, then: Callable[[], None] | None = None) -> None:
        self._path = folder / (STALLED if rank == 0 else f"stalled-{rank}.txt")
        self._seconds = seconds
        self._then = then
        self._doing, self._step = "starting", 0
        self._its_own = False  # whether the file is
        self._timer: threading.Timer | None = None
        self._file: TextIO | None = None

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._its_own = not self._path.exists()
            # behind the last time's, where it began again
            self._file = open(self._path, "a", encoding="utf-8", opener=opened_here)
            try:
                self._arm()
            except BaseException:  # no thread is to be had
                self._leave()
                raise
        return self

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Count from here."""
        self._step, self._its_own = step, True

    def phase(self, name: str) -> None:
        """Something else begins, so what went before has ended."""
        self._doing = f"{name}, step {self._step + 1}"
        self._arm()

    def stepped(self, step: int, *rest: object) -> None:
        """Count on."""
        self._step = step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._file is not None:
            self._disarm()
            self._file.close()
            # A process that was refused leaves the file that it found to the one that is at this run.
            with suppress(OSError):  # the folder may be gone; what ended the run is to be said, not that
                if self._its_own and not self._path.stat().st_size:
                    self._path.unlink()

    def _arm(self) -> None:
        if self._file is None:
            return
        self._disarm()
        faulthandler.dump_traceback_later(self._seconds + GRACE, exit=True, file=self._file)
        self._timer = threading.Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        assert self._file is not None
        print(f"{self._doing}: not done in {self._seconds:g} s", file=self._file, flush=True)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.flush()
        again = "" if self._then else f"; `drpo train --resume {self._path.parent}` goes on from the last checkpoint"
        print(
            f"drpo: {self._doing}: not done in {self._seconds:g} s; the stacks are in {self._path}{again}",
            file=sys.stderr,
            flush=True,
        )
        if self._then is not None:
            self._then()
        os._exit(STATUS)
