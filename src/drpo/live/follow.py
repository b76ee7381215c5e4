"""A run's folder, read while another process writes it: what is new since the last look, and no more."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from drpo.errors import InputError, one_line
from drpo.train.chapters import described, read_chapters
from drpo.train.ending import last_summary, recorded_reason, written
from drpo.train.records import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    ROLLOUTS,
    TIMING,
    TRIALS,
    Evaluation,
    RunFields,
    parse_json,
    read_json,
    refuse_old_run,
    require_types,
    run_fields,
)
from drpo.train.warmed import TALLY, WARM_UP, outcome
from drpo.train.warned import WarningLog

_LAST_BYTES = 2**16
_MOST_BYTES = 2**24

_WRITTEN = (CONFIG, METRICS, TIMING, EVALUATIONS, f"{WARM_UP}/{TALLY}", f"{WARM_UP}/{METRICS}")
"""Files that tell when a run was last at work."""

Record = Mapping[str, Any]


class Lines:
    """The whole lines of a JSON-lines file that grows.

    A line not yet ended is left for later, and one that is not a record is passed over. Where the file no longer says
    what was read of it last, it was rewound by a run that resumed, and is read again from its beginning.

    Args:
        path: of the file; it need not exist.
        keep: what to remember of a record.
    """

    def __init__(self, path: Path, keep: Callable[[Record], Record] = dict) -> None:
        self.path = path
        self.records: list[Record] = []
        self._keep = keep
        self._offset, self._last = 0, b""

    def refresh(self) -> None:
        """Read what was written since the last time."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._forget()
                    file.seek(0)
                new = file.read()
        except FileNotFoundError:
            self._forget()
            return
        whole = new[: new.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        if lines:
            self._offset, self._last = self._offset + len(whole), lines[-1]
            self.records += [self._keep(r) for r in map(_record, lines) if r is not None]

    def _forget(self) -> None:
        self.records = []
        self._offset, self._last = 0, b""


def _record(line: bytes) -> Record | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def last_record(path: Path) -> Record | None:
    """Return the last whole record of a JSON-lines file without reading the rest of it; None where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            length = min(size, _LAST_BYTES)
            while True:
                file.seek(size - length)
                # The block may begin in the midst of a line; what is left of it is no record.
                for line in reversed(file.read(length).splitlines(keepends=True)):
                    if line.endswith(b"\n") and (record := _record(line)) is not None:
                        return record
                if length >= min(size, _MOST_BYTES):
                    return None
                length = min(size, 4 * length)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class View:
    """A run at one moment, as its folder tells it.

    Args:
        folder: of the run.
        config: what config.json says; None before the run has begun.
        metrics: of every step, without those of its single updates, but for step 1's first.
        timing: of every step and of what lies between steps.
        evaluations: so far.
        sample: the last completion in rollouts.jsonl.
        summary: of a run that has ended; None while it goes on, also after a resume.
        reason: why it ended early; None where it did not, or nothing says so.
        silent_s: seconds since anything was written.
        chapters: a line for each place where its settings were changed.
        warnings: raised so far, as summary.json has them.
        warm_up: what came of the warm-up so far, in a line; None without one.
    """

    folder: Path
    config: RunFields | None
    metrics: Sequence[Record]
    timing: Sequence[Record]
    evaluations: Sequence[Evaluation]
    sample: Record | None
    summary: Record | None
    silent_s: float
    chapters: Sequence[str] = ()
    warnings: Sequence[Record] = ()
    warm_up: str | None = None
    reason: str | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def steps(self) -> int:
        """Steps to do in all; 0 before the run has begun."""
        return 0 if self.config is None else self.config.steps

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps that have a metric as a number, and the numbers."""
        numbers = {m["step"]: float(m[name]) for m in self.metrics if isinstance(m.get(name), int | float)}
        finite = {step: value for step, value in numbers.items() if math.isfinite(value)}
        return list(finite), list(finite.values())

    def seconds(self, step: int) -> dict[str, float]:
        """Seconds per phase of a step; empty where they are not known."""
        record = next((t for t in reversed(self.timing) if t["step"] == step and "update" in t), {})
        return {phase: seconds for phase, seconds in record.items() if phase != "step"}

    def phases(self) -> dict[str, float]:
        """Seconds per phase, over the whole run."""
        totals: dict[str, float] = {}
        for record in self.timing:
            for phase, seconds in record.items():
                if phase != "step":
                    totals[phase] = totals.get(phase, 0.0) + seconds
        return totals

    def left_s(self) -> float | None:
        """Seconds that the steps still to do will take at the pace of the last ten; None where that is not known."""
        last = [sum(self.seconds(m["step"]).values()) for m in self.metrics[-10:]]
        return sum(last) / len(last) * (self.steps - self.step) if any(last) else None

    def status(self) -> str:
        """In a word or few, what has become of the run."""
        if self.config is None:
            return "not begun"
        if self.summary is None:
            if self.reason is not None:
                return "ended early"
            return "running" if self.silent_s < 600 else f"silent for {self.silent_s / 60:.0f} min"
        if self.summary.get("finished"):
            return "finished"
        signal = self.summary.get("stopped_by_signal")
        return "ended early" if signal is None else f"stopped by signal {one_line(signal)}"


@dataclass(frozen=True)
class _Taken:
    """How much of the records the warnings have been asked about.

    Args:
        of: the list of metrics that they are of.
        metrics, evaluations: numbers of records.
    """

    of: Sequence[Record] = ()
    metrics: int = 0
    evaluations: int = 0


class Follower:
    """Looks at a run's folder again and again.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = Lines(folder / METRICS, _without_updates)
        self._timing = Lines(folder / TIMING)
        self._evaluations = Lines(folder / EVALUATIONS)
        self._warnings, self._taken = WarningLog(), _Taken()

    def look(self) -> View:
        """Return the run as it is now.

        Raises:
            InputError: config.json, summary.json or the last record of rollouts.jsonl cannot be read.
        """
        for lines in (self._metrics, self._timing, self._evaluations):
            lines.refresh()
        return View(
            folder=self.folder,
            config=_config(self.folder / CONFIG),
            metrics=tuple(self._metrics.records),
            timing=tuple(self._timing.records),
            evaluations=[e for e in map(_evaluation, self._evaluations.records) if e is not None],
            sample=_sample(self.folder / ROLLOUTS),
            summary=last_summary(self.folder),
            reason=recorded_reason(self.folder),
            chapters=self._chapters(),
            silent_s=time.time() - max(written(self.folder / name) for name in _WRITTEN),
            warnings=self._warned(),
            warm_up=outcome(self.folder),
        )

    def _warned(self) -> list[dict[str, Any]]:
        """The warnings so far; records that were read anew are asked anew."""
        metrics, evaluations = self._metrics.records, self._evaluations.records
        if self._taken.of is not metrics:
            self._warnings, self._taken = WarningLog(), _Taken(metrics)
        if not any("nll" in record for record in metrics[-1:]):  # the warnings are of RL, not of supervised fine-tuning
            self._warnings.add(metrics[self._taken.metrics :], evaluations[self._taken.evaluations :])
        self._taken = _Taken(metrics, len(metrics), len(evaluations))
        return self._warnings.summed_up()

    def _chapters(self) -> tuple[str, ...]:
        """What is said of each chapter."""
        return tuple(map(described, read_chapters(self.folder)))


def _without_updates(record: Record) -> Record:
    figures = {name: value for name, value in record.items() if name != "updates"}
    match record.get("updates"):
        case [dict(first), *_] if record["step"] == 1:
            return figures | {"updates": [first]}
    return figures


def _sample(path: Path) -> Record | None:
    record = last_record(path)
    if record is not None:
        require_types(path.name, record, f"{path}, the last record")
    return record


def _config(path: Path) -> RunFields | None:
    try:
        config = read_json(path)  # whole, since its writer replaces it at once
    except FileNotFoundError:
        return None
    refuse_old_run(path.parent)
    try:
        return run_fields(config)
    except InputError as error:
        raise InputError(f"{path} is not of a run: {error}") from None


def _evaluation(record: Record) -> Evaluation | None:
    try:
        return msgspec.convert(record, Evaluation, str_keys=True)
    except (msgspec.ValidationError, UnicodeError):  # of another version, or half a surrogate pair
        return None


def find_trials(folder: Path) -> list[Path]:
    """Return the folders of a comparison's runs, by name; none where the folder is no comparison."""
    return sorted(path for path in (folder / TRIALS).glob("*") if path.is_dir())
