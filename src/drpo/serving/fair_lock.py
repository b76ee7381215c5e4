"""FairLock: several answers are sampled together, one token of one of them at a time."""

import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class FairLock:
    """A lock whose waiting threads get it in the order in which they asked.

    Python's own lock may go to the thread that has just released it, so one answer would keep all others waiting.

    Example:
        >>> lock = FairLock()
        >>> list(lock.taken_by(iter("abc")))
        ['a', 'b', 'c']
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last, self._now = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._last = self._last, self._last + 1
            self._changed.wait_for(lambda: self._now == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()

    def taken_by(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of an iterator, each computed in a turn of its own."""
        while True:
            with self:
                found = next(items, None)
            if found is None:
                return
            yield found
