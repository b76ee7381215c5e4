"""A run's reward and trust-region curves as a PNG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from drpo.files import save_figure
from drpo.objectives import caution, radii, spell
from drpo.report.palette import COLORS
from drpo.train.config import Run
from drpo.train.log import EVALUATIONS, METRICS, read_records

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")


def draw_run(folder: Path, run: Run) -> Path:
    """Draw reward, shift, gradient weights, and lengths over steps; return the PNG's path.

    Args:
        folder: of a run, with its metrics.
        run: its configuration.
    """
    records = read_records(folder / METRICS)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _reward(axes[0, 0], records, read_records(folder / EVALUATIONS))
    _region(axes[0, 1], records, run)
    _weights(axes[1, 0], records)
    _lengths(axes[1, 1], records)
    figure.suptitle(f"{run.name}: {run.model}, {spell(run.objective)}, seed {run.seed}")
    path = folder / "curves.png"
    save_figure(figure, path)
    return path


def _line(
    axes: Axes, records: Sequence[Mapping[str, Any]], name: str, label: str, color: str, style: str = "-"
) -> None:
    found = [(r["step"], r[name]) for r in records if name in r]
    if found:
        axes.plot(*zip(*found, strict=True), style, color=color, label=label, linewidth=1.6)


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _reward(axes: Axes, records: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    _line(axes, records, "reward_mean", "training reward", COLORS[0])
    if evaluations:
        accuracy = [e["accuracy"] for e in evaluations]
        unknown = any(math.isnan(e["low"]) for e in evaluations)  # scores that leave [0, 1] have no interval
        spread = [
            [max(0.0, e["accuracy"] - e["low"]) for e in evaluations],
            [max(0.0, e["high"] - e["accuracy"]) for e in evaluations],
        ]
        axes.errorbar(
            [e["step"] for e in evaluations],
            accuracy,
            yerr=spread,
            fmt="o",
            color=COLORS[1],
            capsize=3,
            label="held-out mean score" if unknown else "held-out accuracy, 95 % interval",
        )
    _finish(axes, "Reward", "score")


def _region(axes: Axes, records: Sequence[Mapping[str, Any]], run: Run) -> None:
    _line(axes, records, "shift_p99", "99th percentile", COLORS[1])
    _line(axes, records, "shift_mean", "mean", COLORS[0])
    for radius in sorted({*(radii(run.objective) or ())}):
        axes.axhline(radius, color=COLORS[6], linestyle=":", label=f"the region's radius, {radius:g}")
    if caution(run.objective) is not None:
        axes.plot([], [], " ", label="no token can leave the region")
    axes.set_yscale("log")
    _finish(axes, "Distance from the sampler, |pi - mu|", "probability")


def _weights(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    for name, label, color in (("weight_max", "max", 1), ("weight_mean", "mean", 0), ("weight_min", "min", 2)):
        _line(axes, records, name, label, COLORS[color])
    axes.axhline(0, color=COLORS[6], linewidth=0.6)
    _finish(axes, "Gradient weight w (below 0: pulled back)", "w")


def _lengths(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    _line(axes, records, "length_terminated", "length of terminated completions", COLORS[0])
    _finish(axes, "Length and truncation", "tokens")
    right = axes.twinx()
    _line(right, records, "truncated", "share truncated", COLORS[1], "--")
    right.set(ylim=(0, 1), ylabel="share truncated")
    right.legend(fontsize=8, loc="lower left")
