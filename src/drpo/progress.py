"""Progress of long work, as lines of the log."""

import logging
import time

log = logging.getLogger("drpo")

EVERY = 10.0
"""Seconds between two lines."""


class Progress:
    """Says how much is done, as long as it goes on; nothing of work that takes seconds.

    Args:
        what: is done, in the plural: "prompts measured".
        total: of these, where it is known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._of = what, "" if total is None else f" of {total:,}"
        self._done, self._said = 0, time.monotonic()

    def add(self) -> None:
        """Count one more."""
        self._done += 1
        if (now := time.monotonic()) - self._said >= EVERY:
            self._said = now
            log.info("%s: %s%s so far", self._what, f"{self._done:,}", self._of)
