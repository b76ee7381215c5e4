"""Rewards that know nothing of drpo, so that both sides run the same ones: functions of the text alone."""

import os
import signal
from typing import Any

_calls = 0


def start() -> None:
    """Begin a run: `stopping` counts from here."""
    global _calls
    _calls = 0


def ascii_share(problem: Any, text: str) -> float:
    """The share of characters that are ASCII: different for most texts of a random model over bytes."""
    return sum(c.isascii() for c in text) / max(1, len(text))


def flaky(problem: Any, text: str) -> float | None:
    """Fails, abstains or scores, by the number of characters."""
    if len(text) % 3 == 0:
        raise ValueError("a multiple of three")
    return None if len(text) % 5 == 0 else ascii_share(problem, text)


def stopping(problem: Any, text: str) -> float:
    """As `ascii_share`; in the second rollout of a tiny run it asks the run to stop, as a scheduler would."""
    global _calls
    _calls += 1
    if _calls == 8 + 20:  # 8 calls of the evaluation, 16 of each rollout
        os.kill(os.getpid(), signal.SIGTERM)
    return ascii_share(problem, text)
