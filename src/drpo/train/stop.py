"""Ctrl-C and SIGTERM end a run at the next step's end, with a checkpoint."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from drpo.errors import Interrupted

SAME_REQUEST_S = 2.0
"""Signals that follow one another so fast are one request: a terminal and a launcher both tell a process."""


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM instead of dying of it; a second one acts at once.

    Args:
        say: is told when the first signal comes.

    Attributes:
        signal: the first one's number, or None.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._say = say
        self._since = 0.0
        self._interrupts = False
        self._before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}

    def __enter__(self) -> "StopRequest":
        """Take the signals over, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let the first signal end what is inside, where that is done again when the run is resumed.

        Raises:
            Interrupted: the signal came, or had come before.
        """
        self._interrupts = True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is not None:
            if now - self._since > SAME_REQUEST_S:
                raise KeyboardInterrupt
            return
        self.signal, self._since = number, now
        self._say(
            f"{signal.Signals(number).name}: finishing this step, then writing a checkpoint (once more stops at once, "
            "and the step is lost)"
        )
        if self._interrupts:
            raise Interrupted
