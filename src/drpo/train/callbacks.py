"""Callbacks of a training run; the trainer itself prints nothing."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from drpo.train.config import Run
from drpo.train.records import Evaluation
from drpo.train.warned import RunWarning
from drpo.types import ScoredGroup

log = logging.getLogger("drpo")


class Callback(Protocol):
    """Receives the events of a run."""

    def started(self, run: Run, folder: Path, step: int) -> None:
        """The run starts, or resumes after `step` steps."""
        ...

    def phase(self, name: str) -> None:
        """A phase starts: rollout, reward, update, sync, evaluation, checkpoint."""
        ...

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Step number `step` (from 1) is done."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """The policy has been evaluated."""
        ...

    def ended(self, summary: Mapping[str, Any]) -> None:
        """The run has ended or was interrupted; `summary` is the content of summary.json."""
        ...

    def note(self, text: str) -> None:
        """A message for the user."""
        ...

    def warned(self, warning: RunWarning) -> None:
        """A warning begins, or goes on for twice as long; `note` has its text already."""
        ...


class NullCallback:
    """Does nothing; a base class for callbacks that use few of the events."""

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Nothing."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Nothing."""

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warned(self, warning: RunWarning) -> None:
        """Nothing."""


class CallbackList:
    """Calls several callbacks, in order. An exception never ends the run: the first of each callback is logged.

    Args:
        callbacks: to call.
    """

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks
        self._failed: set[int] = set()

    def _call(self, call: Callable[[Callback], None]) -> None:
        """Call each callback; KeyboardInterrupt is no `Exception` and passes through."""
        for i, callback in enumerate(self._callbacks):
            try:
                call(callback)
            except Exception as error:
                if i not in self._failed:
                    self._failed.add(i)
                    what = f"{type(error).__name__}: {error}"
                    log.warning("%s failed (%s); the run goes on", type(callback).__name__, what)

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Call each."""
        self._call(lambda callback: callback.started(run, folder, step))

    def phase(self, name: str) -> None:
        """Call each."""
        self._call(lambda callback: callback.phase(name))

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Call each."""
        self._call(lambda callback: callback.stepped(step, metrics, seconds, groups))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Call each."""
        self._call(lambda callback: callback.evaluated(evaluation))

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Call each."""
        self._call(lambda callback: callback.ended(summary))

    def note(self, text: str) -> None:
        """Call each."""
        self._call(lambda callback: callback.note(text))

    def warned(self, warning: RunWarning) -> None:
        """Call each."""
        self._call(lambda callback: callback.warned(warning))
