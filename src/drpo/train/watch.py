"""What a run tells whoever watches it; the trainer itself prints nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from drpo.train.config import Run
from drpo.train.evaluate import Evaluation
from drpo.types import Group


class Watcher(Protocol):
    """Is told of everything that happens; draws it, or does nothing."""

    def started(self, run: Run, folder: Path, step: int) -> None:
        """The run begins, or goes on after `step` steps."""
        ...

    def phase(self, name: str) -> None:
        """A phase begins: rollout, reward, update, sync, evaluation, checkpoint."""
        ...

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[Group]
    ) -> None:
        """Step number `step` (from 1) is done."""
        ...

    def evaluated(self, evaluation: Evaluation) -> None:
        """The policy has been evaluated."""
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
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[Group]
    ) -> None:
        """Nothing."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
