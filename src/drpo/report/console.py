"""A run on the terminal: a live table with a progress bar, or plain lines where there is no terminal."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from drpo.objectives import REGISTRY
from drpo.report.step_table import COLUMNS, cells, result, sample_panel, table
from drpo.spec import format_spec
from drpo.train.config import Run, arithmetic, to_json
from drpo.train.records import Evaluation
from drpo.types import ScoredGroup

SAMPLE_EVERY = 4
"""Steps between sample completions."""
_ROWS = 10


def _header(run: Run, folder: Path, step: int) -> list[str]:
    lines = [
        f"{run.name}: {run.model} learns with {format_spec(run.objective, REGISTRY)}, {to_json(run)['optimizer']}",
        arithmetic(run),
        f"everything goes to {folder}",
    ]
    return [*lines, f"resumed after step {step}"] if step else lines


def _sample(groups: Sequence[ScoredGroup]) -> tuple[str, str, float] | None:
    """The first prompt of the rollout, its first marked completion and the reward; None where nothing is marked."""
    marked = next((g for g in groups if g.episodes), None)
    return None if marked is None else (marked.episodes[0].prompt, marked.episodes[0].text, float(marked.rewards[0]))


class PlainConsole:
    """Plain lines, for logs and pipes.

    Args:
        console: where they go.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> "PlainConsole":
        """Nothing to set up."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Say what runs."""
        for line in _header(run, folder, step):
            self._line(line)

    def phase(self, name: str) -> None:
        """Too much for a log."""

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """One line a step, a sample now and then."""
        self._line(
            "  ".join(
                f"{name} {cell}"
                for name, cell in zip(["step", *COLUMNS, "s"], cells(step, metrics, seconds), strict=True)
            )
        )
        if (step - 1) % SAMPLE_EVERY == 0 and (sample := _sample(groups)):
            self._line(f"  sample (reward {sample[2]:g}): {sample[0]!r} -> {sample[1]!r}")

    def evaluated(self, evaluation: Evaluation) -> None:
        """One line."""
        self._line(result(evaluation))

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Nothing; the command says how it ended."""

    def note(self, text: str) -> None:
        """One line."""
        self._line(text)


class LiveConsole:
    """A table of the last steps, the last sample and a progress bar, drawn in place.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: deque[list[str]] = deque(maxlen=_ROWS)
        self._sample: tuple[str, str, float] | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.fields[phase]:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, phase="loading")
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw)

    def __enter__(self) -> "LiveConsole":
        """Begin to draw."""
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        self._progress.update(self._task, phase="done" if kind is None else "ended")
        self._live.__exit__(kind, error, trace)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [table(self._rows)] if self._rows else []
        if self._sample is not None:
            parts.append(sample_panel(*self._sample))
        return Stack(*parts, self._progress)

    def started(self, run: Run, folder: Path, step: int) -> None:
        """Say what runs, and begin to count."""
        for line in _header(run, folder, step):
            self._console.print(Text(line))
        self._progress.update(self._task, total=run.steps, completed=step)

    def phase(self, name: str) -> None:
        """Show it beside the bar."""
        self._progress.update(self._task, phase=name)

    def stepped(
        self, step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], groups: Sequence[ScoredGroup]
    ) -> None:
        """Add a row, and a new sample now and then."""
        self._rows.append(cells(step, metrics, seconds))
        if (step - 1) % SAMPLE_EVERY == 0:
            self._sample = _sample(groups) or self._sample
        self._progress.update(self._task, completed=step)

    def evaluated(self, evaluation: Evaluation) -> None:
        """A line above the table, which stays."""
        self._console.print(Text(result(evaluation), style="bold"))

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Nothing; the command says how it ended."""

    def note(self, text: str) -> None:
        """A line above the table, which stays."""
        self._console.print(Text(text, style="yellow"))
