"""A run on the terminal: a live table with a progress bar, or plain lines where there is no terminal."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.text import Text

from drpo.errors import counted
from drpo.live.step_table import brief_conversation, cells, no_text, result, sample_panel, scored, steps_bar, table
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run, arithmetic, flat_json
from drpo.train.log import rollout_records
from drpo.train.records import Evaluation
from drpo.types import ScoredGroup

SAMPLE_EVERY = 4
"""Steps between sample completions."""
_ROWS = 10


class RunConsole(NullCallback):
    """Shows a run: live, the last steps, the last sample and a progress bar, drawn in place; else a line a step.

    Args:
        console: where to.
        live: draw in place, on a terminal; else plain lines, for logs and pipes.
    """

    def __init__(self, console: Console, live: bool) -> None:
        self._console, self._in_place = console, live
        self._rows: deque[dict[str, str]] = deque(maxlen=_ROWS)
        self._sample: Mapping[str, Any] | None = None
        self._progress = steps_bar(console, "[bold]{task.fields[phase]:<10}")
        self._task = self._progress.add_task("", total=None, phase="loading")
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw)

    def __enter__(self) -> "RunConsole":
        """Begin to draw."""
        if self._in_place:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        self._progress.update(self._task, phase="done" if kind is None else "ended")
        if self._in_place:
            self._live.__exit__(kind, error, trace)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [table(self._rows)] if self._rows else []
        if self._sample is not None:
            parts.append(sample_panel(self._sample))
        return Stack(*parts, self._progress)

    def _line(self, text: str, style: str = "") -> None:
        """A line that stays, above what is drawn in place."""
        self._console.print(Text(text, style=style if self._in_place else ""), soft_wrap=True)

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Say what runs, and begin to count."""
        specs = flat_json(run)
        self._line(f"{run.name}: {run.model.name} learns with {specs['objective']}, {specs['optimizer']}")
        self._line(arithmetic(run))
        self._line(f"everything goes to {folder}")
        if step:
            self._line(f"resumed after step {step}")
        self._progress.update(self._task, total=run.trainer.steps, completed=step)

    def phase(self, name: str) -> None:
        """Show it beside the bar."""
        self._progress.update(self._task, phase=name)

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Add a row or a line, and a new sample now and then."""
        row = cells(step, metrics, seconds)
        sample = _sample(step, groups) if (step - 1) % SAMPLE_EVERY == 0 else None
        self._rows.append(row)
        self._sample = sample or self._sample
        self._progress.update(self._task, completed=step)
        if not self._in_place:
            self._line("  ".join(f"{name} {cell}" for name, cell in row.items()))
            if sample is not None:
                self._line(f"  sample ({scored(sample['reward'])}): {_said(sample)}")

    def evaluated(self, evaluation: Evaluation) -> None:
        """Say how it went."""
        self._line(result(evaluation), "bold")

    def note(self, text: str) -> None:
        """Say it."""
        self._line(text, "yellow")


class SFTConsole(RunConsole):
    """Shows a run of supervised fine-tuning in the same way: live, the last steps and a progress bar."""

    def started(self, run: Any, folder: Path, step: int) -> None:
        """Say what runs, and begin to count."""
        trainer = run.trainer
        self._line(f"{run.name}: {run.model.name} learns {run.data.path}")
        self._line(f"up to {counted(trainer.batch, 'conversation')} a step, {counted(trainer.steps, 'step')}")
        self._line(f"everything goes to {folder}")
        if step:
            self._line(f"resumed after step {step}")
        self._progress.update(self._task, total=trainer.steps, completed=step)


def _sample(step: int, groups: Sequence[ScoredGroup]) -> dict[str, Any] | None:
    """The record of the rollout's first scored episode; None where nothing is scored."""
    group = next((g for g in groups if g.episodes), None)
    if group is None:
        return None
    return next(r for r in rollout_records(step, [group], {}) if r["reward"] is not None)


def _said(record: Mapping[str, Any]) -> str:
    if "messages" in record:
        return brief_conversation(record)
    return f"{record['prompt']!r} -> {no_text(record['text']) or repr(record['text'])}"
