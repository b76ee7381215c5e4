"""Ends a process that hangs, and writes the stacks of its threads."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from drpo.errors import as_typed
from drpo.files import opened_here
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run
from drpo.train.records import STALLED

STATUS = 75
"""The exit status: EX_TEMPFAIL, try again."""

GRACE = 30.0
"""Seconds after which faulthandler ends a process that Python could not end."""


class Watchdog(NullCallback):
    """A callback that ends the process when a phase of a run takes too long.

    An engine may hang in code that no exception reaches. The stacks of all threads go to `stalled.txt` in the run's
    folder, one line to stderr, and the process calls `then` or ends with status 75; `--resume` goes on from the last
    checkpoint. Where code holds the interpreter's lock, faulthandler writes the stacks and ends the process
    half a minute later, with status 1.

    Args:
        folder: of the run.
        seconds: longest time of a phase; 0 sets no limit.
        rank: of several processes; all but the first write to `stalled-RANK.txt`.
        then: called in a thread of its own, for example to restart the run; if it returns, the process ends.
        command: that goes on with the run, for the message.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        rank: int = 0,
        then: Callable[[], None] | None = None,
        command: str = "drpo train",
    ) -> None:
        self._path = folder / (STALLED if rank == 0 else f"stalled-{rank}.txt")
        self._seconds = seconds
        self._then, self._command = then, command
        self._doing, self._step = "starting", 0
        self._owns_file = False  # else the file may be that of another process, which trains this run
        self._timer: threading.Timer | None = None
        self._file: TextIO | None = None

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._owns_file = not self._path.exists()
            # a restarted run appends
            self._file = open(self._path, "a", encoding="utf-8", opener=opened_here)
            try:
                self._arm()
            except BaseException:  # no thread could be started
                self._leave()
                raise
        return self

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Set the number of steps done."""
        self._step, self._owns_file = step, True

    def phase(self, name: str) -> None:
        """Restart the timer for a new phase."""
        self._doing = f"{name}, step {self._step + 1}"
        self._arm()

    def stepped(self, step: int, *rest: object) -> None:
        """Set the number of steps done."""
        self._step = step

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._file is not None:
            self._disarm()
            self._file.close()
            with suppress(OSError):  # the folder may be gone; the error that ended the run is the one to report
                if self._owns_file and not self._path.stat().st_size:
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
        resume = f"{self._command} --resume {as_typed(self._path.parent)}"
        advice = "" if self._then else f"; `{resume}` goes on from the last checkpoint"
        print(
            f"drpo: {self._doing}: not done in {self._seconds:g} s; the stacks are in {self._path}{advice}",
            file=sys.stderr,
            flush=True,
        )
        if self._then is not None:
            self._then()
        os._exit(STATUS)
