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

from drpo.live.step_table import HEAD, cells, result, sample_panel, steps_bar, table
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run, arithmetic, flat_json
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
        self._rows: deque[list[str]] = deque(maxlen=_ROWS)
        self._sample: tuple[str, str, float] | None = None
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
            parts.append(sample_panel(*self._sample))
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
        sample = _sample(groups) if (step - 1) % SAMPLE_EVERY == 0 else None
        self._rows.append(row)
        self._sample = sample or self._sample
        self._progress.update(self._task, completed=step)
        if not self._in_place:
            self._line("  ".join(f"{name} {cell}" for name, cell in zip(HEAD, row, strict=True)))
            if sample is not None:
                self._line(f"  sample (reward {sample[2]:g}): {sample[0]!r} -> {sample[1]!r}")

    def evaluated(self, evaluation: Evaluation) -> None:
        """Say how it went."""
        self._line(result(evaluation), "bold")

    def note(self, text: str) -> None:
        """Say it."""
        self._line(text, "yellow")


def _sample(groups: Sequence[ScoredGroup]) -> tuple[str, str, float] | None:
    """The first prompt of the rollout, its first scored completion and the reward; None where nothing is scored."""
    scored = next((g for g in groups if g.episodes), None)
    return None if scored is None else (scored.episodes[0].prompt, scored.episodes[0].text, float(scored.rewards[0]))
