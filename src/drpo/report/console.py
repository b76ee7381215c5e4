"""A run on the terminal: a live table with a progress bar, or plain lines where there is no terminal."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drpo.errors import printable
from drpo.objectives import spell
from drpo.train.config import Run, arithmetic
from drpo.train.evaluate import Evaluation
from drpo.types import ScoredGroup

SAMPLE_EVERY = 4
"""Steps between sample completions."""
_ROWS = 10
COLUMNS: Mapping[str, tuple[str, str]] = {
    "reward": ("reward_mean", "{:.3f}"),
    "length": ("length_terminated", "{:.1f}"),
    "cut": ("truncated", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "|π-μ|": ("shift_mean", "{:.4f}"),
    "p99": ("shift_p99", "{:.3f}"),
    "outside": ("outside", "{:.2%}"),
    "w min": ("weight_min", "{:.2f}"),
    "max|r·w|": ("scaled_weight_max", "{:.2f}"),
    "grad": ("grad_norm", "{:.3g}"),
}
"""Heading -> the metric under it, and how it is written."""


def cells(step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> list[str]:
    """Return a step's row of a table: its number, `COLUMNS`, its seconds; "-" for what is not known."""
    shown = [form.format(metrics[key]) if key in metrics else "-" for key, form in COLUMNS.values()]
    return [str(step), *shown, f"{sum(seconds.values()):.1f}" if seconds else "-"]


def table(rows: Iterable[Sequence[str]]) -> Table:
    """Return rows of `cells` under their names."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", *COLUMNS, "s"):
        drawn.add_column(name, justify="right")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def sample_panel(prompt: str, text: str, reward: float | None) -> Panel:
    """Return a completion in a box, under its prompt; control characters, which could steer the terminal, as U+FFFD."""
    prompt, text = map(printable, (prompt, text))
    style = "green" if reward and reward > 0 else "yellow"
    body = Text.assemble((prompt, "dim"), "\n", (text.strip() or "(nothing)", style))
    said = "not marked" if reward is None else f"reward {reward:g}"
    return Panel(body, title=f"a sample, {said}", title_align="left")


def mean_score(mean: float, low: float | None, high: float | None) -> tuple[str, str]:
    """Return a held-out mean and its 95 % interval in words; of scores that leave [0, 1] the plain mean alone.

    Args:
        mean: of the scores.
        low, high: of the interval; nan or None where there is none.

    Example:
        >>> mean_score(0.5, 0.404, 0.596)
        ('50.0%', '95 % interval 40.4% to 59.6%')
        >>> mean_score(-0.0081, None, None)
        ('-0.0081', '')
    """
    if low is None or high is None or math.isnan(low):
        return f"{mean:.4g}", ""
    return f"{mean:.1%}", f"95 % interval {low:.1%} to {high:.1%}"


def paired_change(difference: float, low: float | None, high: float | None, shares: bool) -> tuple[str, str]:
    """Return a held-out mean's paired difference from another, and its 95 % interval, in words.

    Args:
        difference: of the means over the same problems.
        low, high: of its interval; None where there is none.
        shares: whether the scores lie in [0, 1].

    Example:
        >>> paired_change(0.125, 0.05, 0.2, shares=True)
        ('+12.5 points', 'paired, 95 % interval +5.0 to +20.0 points')
        >>> paired_change(-0.25, None, None, shares=False)
        ('-0.25', '')
    """

    def signed(value: float) -> str:
        return f"{100 * value:+.1f}" if shares else f"{value:+.4g}"

    unit = " points" if shares else ""
    interval = "" if low is None or high is None else f"paired, 95 % interval {signed(low)} to {signed(high)}{unit}"
    return f"{signed(difference)}{unit}", interval


def no_gradient(counts: Mapping[str, Any]) -> tuple[str, str]:
    """Return how much of a run trained on nothing, in words.

    Args:
        counts: of a summary.

    Example:
        >>> no_gradient({"zero_grad_steps": 9, "steps": 12, "zero_grad_updates": 18, "updates": 24,
        ...              "frac_reward_zero_std": 0.75})
        ('9 of 12 steps', '18 of 24 updates; rewards equal in 75% of groups')
    """
    equal = counts["frac_reward_zero_std"]
    groups = "" if equal is None else f"; rewards equal in {equal:.0%} of groups"
    steps = f"{counts['zero_grad_steps']} of {counts['steps']} steps"
    return steps, f"{counts['zero_grad_updates']} of {counts['updates']} updates{groups}"


def result(evaluation: Evaluation) -> str:
    """Return an evaluation in a line."""
    when = "before training" if evaluation.step == 0 else f"after {evaluation.step} steps"
    k, n = evaluation.n_samples, evaluation.n_problems
    mean, interval = mean_score(evaluation.accuracy, evaluation.low, evaluation.high)
    change = _from_step_0(evaluation, shares=bool(interval))
    if not interval:
        return f"held-out mean score {when}: {mean} ({n} problems, avg@{k}){change}"
    extra = f", pass@{k} {evaluation.pass_at[k]:.1%}" if k > 1 else ""
    return f"held-out accuracy {when}: {mean} ({interval}, {n} problems, avg@{k}{extra}){change}"


def _from_step_0(evaluation: Evaluation, shares: bool) -> str:
    if evaluation.difference is None:
        return ""
    low, high = evaluation.difference_low, evaluation.difference_high
    text, interval = paired_change(evaluation.difference, low, high, shares)
    return f"; {text} from step 0{interval and f' ({interval})'}"


def _header(run: Run, folder: Path, step: int) -> list[str]:
    lines = [
        f"{run.name}: {run.model} learns with {spell(run.objective)}, learning rate {run.learning_rate:g}",
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
