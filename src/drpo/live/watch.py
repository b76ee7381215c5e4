"""The picture of a run, or of a comparison's runs, that another process is at."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from statistics import fmean

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from drpo.errors import one_line
from drpo.live.follow import View
from drpo.live.step_table import cells, result, sample_panel, table, turn_figures
from drpo.report.words import warnings_in_words
from drpo.train.no_gradient import in_all, lately, without_gradient

_ROWS = 10
_BARS = "▁▂▃▄▅▆▇█"
CURVES: Mapping[str, str] = {
    "reward": "reward_mean",
    "loss": "nll",
    "held-out loss": "held_out_nll",
    "|π-μ|": "prob_diff_mean",
    "turns": "turns",
    "active problems": "curriculum_active",
    "explained variance": "explained_variance",
    "value loss": "value_loss",
}
"""Title of a curve -> its metric; those of what a run has not (rewards, an environment, a critic) are absent."""


def sparkline(values: Sequence[float], width: int, low: float, high: float) -> str:
    """Return values as a line of little bars, as many as fit, each the mean of its share of the values.

    Args:
        values: finite.
        width: most characters.
        low, high: of the scale; values beyond are drawn at its ends.

    Example:
        >>> sparkline([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], 3, 0.0, 1.0)
        '▁▅█'
    """
    span, n = high - low or 1.0, min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)] if n else []
    means = [fmean(values[a:b]) for a, b in pairwise(edges)]
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int((m - low) / span * len(_BARS))))] for m in means)


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds.

    Example:
        >>> duration(75.4)
        '0:01:15'
    """
    return str(timedelta(seconds=round(seconds)))


def draw_view(view: View, width: int) -> RenderableType:
    """Return a run's picture.

    Args:
        view: of the run.
        width: characters there are.
    """
    if view.config is None:
        return Text(f"waiting for {view.folder} to begin")
    config = view.config
    parts: list[RenderableType] = [
        Text(one_line(f"{config.name}: {config.model} learns with {config.objective}, ") + " ", style="bold")
        + Text(f"{config.optimizer}, seed {config.seed}", style="bold"),
        _progress(view),
        *([] if view.reason is None else [Text(view.reason, style="yellow")]),
        *([] if view.warm_up is None else [Text(one_line(f"warm-up: {view.warm_up}"))]),
        *(Text(chapter) for chapter in view.chapters),
    ]
    if view.metrics:
        parts.append(table(cells(m["step"], m, view.seconds(m["step"])) for m in view.metrics[-_ROWS:]))
        parts.append(_curves(view, width))
        if figures := turn_figures(view.metrics[-1]):
            parts.append(Text(figures))
    if idle := sum(map(without_gradient, view.metrics)):
        parts.append(Text(f"no gradient in {idle} of {len(view.metrics)} steps", style="yellow"))
    if (warning := in_all(view.metrics) if view.summary is not None else lately(view.metrics)) is not None:
        parts.append(Text(warning, style="yellow"))
    if view.warnings:
        parts.append(Text(f"warnings: {warnings_in_words(view.warnings)}", style="yellow"))
    if phases := view.phases():
        total = sum(phases.values()) or 1.0
        shares = ", ".join(f"{name} {s / total:.0%}" for name, s in sorted(phases.items(), key=lambda p: -p[1]))
        parts.append(Text(one_line(f"{duration(total)}: {shares}")))
    shown = [e for i, e in enumerate(view.evaluations) if i in (0, len(view.evaluations) - 1)]
    parts += [Text(result(e), style="bold") for e in shown]
    if (sample := view.sample) is not None:
        parts.append(sample_panel(sample))
    return Stack(*parts)


def _progress(view: View) -> RenderableType:
    """A line: how far, how long still, and what has become of the run."""
    left = view.left_s() if view.summary is None else None
    text = f" {view.step}/{view.steps} steps, {view.status()}"
    text += f", about {duration(left)} of steps left" if left is not None else ""
    line = Table.grid()
    line.add_row(ProgressBar(total=view.steps, completed=view.step, width=30), Text(text))
    return line


def _curves(view: View, width: int) -> RenderableType:
    lines = Table.grid(padding=(0, 1))
    for name, metric in CURVES.items():
        _, values = view.curve(metric)
        if values:
            low, high = min(values), max(values)
            lines.add_row(name, sparkline(values, width - 45, low, high), f"{low:.3g} to {high:.3g}")
    return lines


def draw_views(views: Sequence[View], width: int) -> RenderableType:
    """Return a row for each run of a comparison; the little bars are all on one scale.

    Args:
        views: of the runs.
        width: characters there are.
    """
    rewards = [view.curve("reward_mean")[1] for view in views]
    everything = [reward for column in rewards for reward in column] or [0.0]
    low, high = min(everything), max(everything)
    names = max((len(view.folder.name) for view in views), default=0)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "step", "reward", "last 5", f"reward, {low:.3g} to {high:.3g}", ""):
        rows.add_column(heading, justify="right" if heading in ("step", "reward", "last 5") else "left", no_wrap=True)
    for view, column in zip(views, rewards, strict=True):
        last = [f"{column[-1]:.3f}", f"{sum(column[-5:]) / len(column[-5:]):.3f}"] if column else ["-", "-"]
        bars = sparkline(column, max(10, width - names - 50), low, high)
        rows.add_row(one_line(view.folder.name), f"{view.step}/{view.steps}", *last, bars, _styled(view.status()))
    return rows


def _styled(status: str) -> Text:
    return Text(status, style={"finished": "green", "running": "bold", "not begun": "dim"}.get(status, "yellow"))
