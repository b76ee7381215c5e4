"""Ctrl-C and SIGTERM end a run at the next step's end, with a checkpoint."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from drpo.errors import Interrupted

SAME_REQUEST_S = 2.0
"""Signals within this time are one request: a terminal and a launcher may both signal a process."""


class StopRequest:
    """While entered, records the first SIGINT or SIGTERM; a second one interrupts at once.

    Args:
        say: called with a message at the first signal.

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
        """Install the signal handlers; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let the first signal interrupt the block, for work that a resumed run repeats.

        Raises:
            Interrupted: a signal has come, inside or before.
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
