"""Ctrl-C and SIGTERM end a run at the next step's end, with a checkpoint."""

import signal
import threading
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """While entered, notes the first SIGINT or SIGTERM instead of dying of it; a second one acts at once.

    Args:
        say: is told when the first signal comes.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal: int | None = None
        self._say = say
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._say(
            f"{signal.Signals(number).name}: finishing this step, then writing a checkpoint (once more stops at once, "
            "and the step is lost)"
        )
