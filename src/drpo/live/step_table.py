"""Steps, evaluations and samples of a run as the terminal shows them, from its records alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drpo.errors import counted, printable
from drpo.report.words import mean_score, measure, paired_change
from drpo.terminal import Sheet, as_table
from drpo.train.records import Evaluation

COLUMNS: Mapping[str, tuple[str, str]] = {
    "reward": ("reward_mean", "{:.3f}"),
    "length": ("length_terminated", "{:.1f}"),
    "cut": ("truncated", "{:.0%}"),
    "entropy": ("entropy", "{:.2f}"),
    "|π-μ|": ("prob_diff_mean", "{:.4f}"),
    "p99": ("prob_diff_p99", "{:.3f}"),
    "out_of_region": ("out_of_region", "{:.2%}"),
    "w min": ("weight_min", "{:.2f}"),
    "max|r·w|": ("scaled_weight_max", "{:.2f}"),
    "grad": ("grad_norm", "{:.3g}"),
}
"""Heading -> the metric under it, and how it is written."""
HEAD = ("step", *COLUMNS, "s")
"""Of the columns of `cells`."""


def cells(step: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> list[str]:
    """Return a step's row of a table: its number, `COLUMNS`, its seconds; "-" for what is not known."""
    shown = [form.format(metrics[key]) if key in metrics else "-" for key, form in COLUMNS.values()]
    return [str(step), *shown, f"{sum(seconds.values()):.1f}" if seconds else "-"]


def table(rows: Iterable[Sequence[str]]) -> Table:
    """Return rows of `cells` under their names."""
    return as_table(Sheet("", HEAD, tuple(map(tuple, rows))), left=0)


def steps_bar(console: Console, label: str) -> Progress:
    """Return a progress bar that counts steps, with the time so far and the time left.

    Args:
        console: where it is drawn.
        label: the text before the bar, with the task's fields in rich's form.
    """
    return Progress(
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def sample_panel(prompt: str, text: str, reward: float | None) -> Panel:
    """Return a completion in a box, under its prompt; control characters, which could steer the terminal, as U+FFFD."""
    prompt, text = map(printable, (prompt, text))
    style = "green" if reward and reward > 0 else "yellow"
    body = Text.assemble((prompt, "dim"), "\n", (text.strip() or "(nothing)", style))
    said = "not scored" if reward is None else f"reward {reward:g}"
    return Panel(body, title=f"a sample, {said}", title_align="left")


def result(evaluation: Evaluation) -> str:
    """Return an evaluation in a line."""
    when = "before training" if evaluation.step == 0 else f"after {counted(evaluation.step, 'step')}"
    k, n = evaluation.n_samples, evaluation.n_problems
    mean, interval = mean_score(evaluation.reward_mean, evaluation.low, evaluation.high)
    change = _from_step_0(evaluation, shares=bool(interval))
    name = measure(evaluation.reward_mean, evaluation.pass_at[1], bool(interval))
    parts = "".join(f"; {printable(part)} {value:.3g}" for part, value in evaluation.reward_parts.items())
    if not interval:
        return f"held-out {name} {when}: {mean} ({n} problems, avg@{k}){change}{parts}"
    extra = f", pass@{k} {evaluation.pass_at[k]:.1%}" if k > 1 else ""
    return f"held-out {name} {when}: {mean} ({interval}, {n} problems, avg@{k}{extra}){change}{parts}"


def _from_step_0(evaluation: Evaluation, shares: bool) -> str:
    if evaluation.difference is None:
        return ""
    low, high = evaluation.difference_low, evaluation.difference_high
    text, interval = paired_change(evaluation.difference, low, high, shares)
    return f"; {text} from step 0{interval and f' ({interval})'}"
