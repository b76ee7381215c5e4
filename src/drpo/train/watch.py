"""What a run tells whoever watches it; the trainer itself prints nothing."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from drpo.train.config import Run
from drpo.train.records import Evaluation
from drpo.types import ScoredGroup

log = logging.getLogger("drpo")


class Watcher(Protocol):
    """Is told of everything that happens; draws it, or does nothing."""

    def started(self, run: Run, folder: Path, step: int) -> None:
        """The run begins, or goes on after `step` steps."""
        ...

    def phase(self, name: str) -> None:
        """A phase begins: rollout, reward, update, sync, evaluation, checkpoint."""
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
        """The run has ended, or this session's share of it; the summary is what summary.json says."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...


class Silent:
    """Watches without a word."""

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


class Together:
    """Tells several watchers, in order. Telling never ends a run: of what a watcher raises the first is logged.

    Args:
        watchers: to tell.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers
        self._failed: set[int] = set()

    def _tell(self, tell: Callable[[Watcher], None]) -> None:
        """Ctrl-C and the like pass; they are no `Exception`."""
        for i, watcher in enumerate(self._watchers):
            try:
                tell(watcher)
            except Exception as error:
                if i not in self._failed:
                    self._failed.add(i)
                    what = f"{type(error).__name__}: {error}"
                    log.warning("%s could not be told (%s); the run goes on", type(watcher).__name__, what)

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Tell each."""
        self._tell(lambda watcher: watcher.started(run, folder, step))

    def phase(self, name: str) -> None:
        """Tell each."""
        self._tell(lambda watcher: watcher.phase(name))

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Tell each."""
        self._tell(lambda watcher: watcher.stepped(step, metrics, seconds, groups))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Tell each."""
        self._tell(lambda watcher: watcher.evaluated(evaluation))

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Tell each."""
        self._tell(lambda watcher: watcher.ended(summary))

    def note(self, text: str) -> None:
        """Tell each."""
        self._tell(lambda watcher: watcher.note(text))
