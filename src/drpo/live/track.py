"""A run's figures to a tracker besides: TensorBoard, Weights & Biases, Trackio.

A tracker works in a thread of its own, on copies. One that is missing, raises or hangs costs a line, never the run, and
nothing that it does can change the run's numbers.
"""

import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from drpo.files import require_own, write_text
from drpo.train.config import Run, to_json
from drpo.train.records import Evaluation
from drpo.train.warned import RunWarning
from drpo.types import ScoredGroup

PROJECT = "drpo"
RUN_ID = "tracking-id"
"""File of a run's folder with the name that trackers know it by, also after a resume."""
_PATIENCE_S = 60.0
_MOST_WAITING = 1000


class Tracker(Protocol):
    """Takes figures; whatever it raises is caught."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; there may be several calls for one step."""
        ...

    def alert(self, step: int, warning: RunWarning) -> None:
        """Take a warning, as the tracker shows one: an alert where it has them."""
        ...

    def close(self) -> None:
        """Write what is not yet written."""
        ...


Opener = Callable[[Run, Path, int], Tracker]
"""open(run, folder, step): a tracker of a run that begins, or goes on after `step` steps."""


def flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record, each under its path.

    Args:
        record: of numbers, records and sequences; anything else is left out.
        prefix: of every path.

    Example:
        >>> flattened({"loss": 1, "updates": [{"loss": 0.5}, {"loss": 0.25}], "note": "none"})
        {'loss': 1.0, 'updates/0/loss': 0.5, 'updates/1/loss': 0.25}
    """
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, int | float):
            found[f"{prefix}{name}"] = float(value)
        elif isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}/")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            found |= flattened(dict(enumerate(value)), f"{prefix}{name}/")  # type: ignore[arg-type]
    return found


class Tracked:
    """Watches a run for a tracker: hands every figure over at once, and waits for the tracker at the end only.

    Args:
        name: of the tracker.
        opener: makes it.
        say: is told in a line when it fails; from then on it is left alone.
        patience_s: seconds it is given at the end to write what is left.
    """

    def __init__(self, name: str, opener: Opener, say: Callable[[str], None], patience_s: float = _PATIENCE_S) -> None:
        self._name, self._open, self._say, self._patience_s = name, opener, say, patience_s
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._dropped = threading.Event()

    def __enter__(self) -> "Tracked":
        """Nothing yet; the tracker is opened when the run begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the tracker finish, whatever ended the run."""
        if self._thread is None or self._dropped.is_set():
            return
        self._hand_over(None)
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            self._drop(f"still busy after {self._patience_s:g} s")

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Open the tracker."""
        self._thread = threading.Thread(
            target=self._work, args=(run, folder, step), name=f"track-{self._name}", daemon=True
        )
        self._thread.start()

    def phase(self, name: str) -> None:
        """Nothing."""

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Hand over what metrics.jsonl and timing.jsonl say of the step."""
        figures = {name: value for name, value in metrics.items() if name != "step"}
        self._log(step, flattened(figures) | flattened(seconds, "seconds/"))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Hand over what evaluations.jsonl says."""
        apart = ("step", "problem_means")  # single problems are no curves
        record = {name: value for name, value in asdict(evaluation).items() if name not in apart}
        self._log(evaluation.step, flattened(record, "evaluation/"))

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Hand over the seconds of the whole run, those between steps among them."""
        self._log(summary["steps"], flattened(summary["seconds"], "seconds_in_all/"))

    def note(self, text: str) -> None:
        """Nothing."""

    def warned(self, warning: RunWarning) -> None:
        """Hand over a warning."""
        self._hand_over(lambda tracker: tracker.alert(warning.last_step, warning))

    def _log(self, step: int, figures: dict[str, float]) -> None:
        self._hand_over(lambda tracker: tracker.log(step, figures))

    def _hand_over(self, item: Callable[[Tracker], None] | None) -> None:
        if not self._dropped.is_set():
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self._drop(f"{_MOST_WAITING} steps behind")

    def _work(self, run: Run, folder: Path, step: int) -> None:
        try:
            tracker = self._open(run, folder, step)
            while (item := self._queue.get()) is not None:
                item(tracker)
            tracker.close()
        except BaseException as error:  # a package may also try to exit
            lines = str(error).splitlines()
            self._drop(f"{type(error).__name__}{f': {lines[0]}' if lines else ''}")

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self._say(f"tracker {self._name}: {reason}; the run goes on without it")


def _known_name(folder: Path) -> str:
    """The folder's name and a random end, the same whenever the run goes on."""
    path = folder / RUN_ID
    if not path.exists() or path.is_symlink():  # a link might have sent any file of the user's to the tracker
        write_text(path, f"{folder.resolve().name}-{secrets.token_hex(4)}\n")
    return path.read_text(encoding="utf-8").strip()


class _TensorBoard:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (an optional backend)

        require_own(folder / "tensorboard")
        # What was written past the checkpoint that the run goes on from is taken back.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0, flush_secs=10)
        self._writer.add_text("config", f"```json\n{json.dumps(to_json(run), indent=2)}\n```", step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def alert(self, step: int, warning: RunWarning) -> None:
        self._writer.add_text(f"warnings/{warning.name}", warning.text, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        import wandb  # noqa: PLC0415 (an optional backend)

        require_own(folder / "wandb")
        name = _known_name(folder)
        told = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=name,
            resume="allow",
            dir=folder,
            config=to_json(run),
            mode=None if told else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Not wandb's own counter, which never goes back: a run that resumes may.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def alert(self, step: int, warning: RunWarning) -> None:
        self._run.alert(title=warning.name, text=f"step {step}: {warning.text}", level="WARN")

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, run: Run, folder: Path, step: int) -> None:
        import trackio  # noqa: PLC0415 (an optional backend)

        self._run = trackio.init(
            project=PROJECT,
            name=_known_name(folder),
            config=to_json(run),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def alert(self, step: int, warning: RunWarning) -> None:
        self._run.alert(title=warning.name, text=warning.text, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Opener] = {"trackio": _Trackio, "tensorboard": _TensorBoard, "wandb": _WandB}
"""As `--track` names them."""
