"""FairLock: lets several answers share a model, token by token."""

import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class FairLock:
    """A lock that waiting threads acquire in the order of their requests.

    Python's own lock may return to the thread that released it, so that one answer would block all others. Once closed,
    it raises ConnectionError in threads that wait for it or ask for it again.

    Example:
        >>> lock = FairLock()
        >>> list(lock.taken_by(iter("abc")))
        ['a', 'b', 'c']
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last, self._now = 0, 0
        self._closed = False

    def __enter__(self) -> None:
        with self._changed:
            mine, self._last = self._last, self._last + 1
            self._changed.wait_for(lambda: self._closed or self._now == mine)
            if self._closed:
                raise ConnectionError("the server ends")

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let no thread in any more; the thread inside leaves as always."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def taken_by(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items of an iterator; each is computed while the lock is held."""
        while True:
            with self:
                found = next(items, None)
            if found is None:
                return
            yield found
