"""Why a run ended before its last step: what its summary records, and what its folder tells. Imports no torch."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo.credentials import shown, without_secrets
from drpo.errors import message_of, one_line
from drpo.train.records import ENVIRONMENT, STALLED, SUMMARY, read_json

_LONGEST = 300  # letters of a reason


def reason(error: BaseException | None, stopped_by: int | None = None) -> str | None:
    """Return why a run ended early, in a line without control characters and secrets.

    Args:
        error: that ended it, or None.
        stopped_by: number of the signal that ended it after a step, or None.

    Returns:
        At most 300 letters; None where neither ended it.

    Example:
        >>> reason(ValueError("the reward failed:\\n http://me:secret@judge/v1 refused"))
        'ValueError: the reward failed: http://judge/v1 refused'
        >>> reason(KeyboardInterrupt()), reason(None, 15), reason(None)
        ('interrupted at once; the step that was under way is lost', 'stopped by SIGTERM', None)
    """
    if error is None:
        return f"stopped by {signal.Signals(stopped_by).name}" if stopped_by else None
    if isinstance(error, KeyboardInterrupt):
        return "interrupted at once; the step that was under way is lost"
    return _cut(shown(without_secrets(message_of(error))))


def last_summary(folder: Path) -> Mapping[str, Any] | None:
    """Return the content of a run's summary.json; None where there is none, or a later session goes on.

    Args:
        folder: of the run.

    Raises:
        InputError: it cannot be read.
    """
    try:
        summary = read_json(folder / SUMMARY)
    except FileNotFoundError:
        return None
    # Every session writes its environment first and its summary last.
    old = written(folder / SUMMARY) < written(folder / ENVIRONMENT)
    return None if old and not summary.get("finished") else summary


def recorded_reason(folder: Path) -> str | None:
    """Return why a run's last session ended early; None where it did not, where nothing says so, or where one goes on.

    Args:
        folder: of the run.

    Raises:
        InputError: summary.json cannot be read.
    """
    summary = last_summary(folder)
    if summary is not None:
        text = summary.get("reason")
        return _cut(one_line(text)) if isinstance(text, str) and text else None
    stalled = folder / STALLED
    if written(stalled) > written(folder / ENVIRONMENT) and stalled.stat().st_size:
        return f"stalled; {STALLED} has the stacks of its threads"
    return None


def written(path: Path) -> float:
    """Return when a file was written last, in seconds since the epoch; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
