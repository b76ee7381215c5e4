"""A run's curves as a PNG."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from drpo.files import save_figure
from drpo.objectives import REGISTRY
from drpo.report.palette import COLORS
from drpo.report.panels import Levels, Line, Panel, drawn_lines
from drpo.spec import format_spec
from drpo.train.config import Run
from drpo.train.records import EVALUATIONS, METRICS, read_records

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")
STYLES = ("-", "--", ":")
N_COLUMNS = 3
CURVES = "curves.png"


def draw_run(folder: Path, run: Run) -> Path:
    """Draw the panels of a run's report; return the PNG's path.

    Args:
        folder: of a run, with its metrics.
        run: its configuration.
    """
    panels = drawn_lines(run, read_records(folder / METRICS), read_records(folder / EVALUATIONS))
    n_rows = max(1, -(-len(panels) // N_COLUMNS))
    figure = Figure(figsize=(4.2 * N_COLUMNS, 2.7 * n_rows), layout="constrained")
    grid = list(figure.subplots(n_rows, N_COLUMNS, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, drawn in zip(grid, panels, strict=False):
        _panel(axes, *drawn)
    figure.suptitle(f"{run.name}: {run.model.name}, {format_spec(run.objective.loss, REGISTRY)}, seed {run.seed}")
    save_figure(figure, folder / CURVES)
    return folder / CURVES


def _panel(axes: Axes, panel: Panel, lines: list[Line], levels: Levels) -> None:
    axes.set_axis_on()
    for i, line in enumerate(lines):
        y = [float("nan") if value is None else value for value in line.y]
        axes.plot(
            line.x, y, STYLES[i % len(STYLES)], color=COLORS[i % len(COLORS)], label=line.name, marker=".", markersize=3
        )
        if line.low is not None and line.high is not None:
            for x, low, high in zip(line.x, line.low, line.high, strict=True):
                if low is not None and high is not None:
                    axes.vlines(x, low, high, color=COLORS[i % len(COLORS)])
    for name, height in levels:
        axes.axhline(height, color="0.5", linestyle=":", linewidth=1, label=f"{name} {height:g}")
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit, yscale="log" if panel.log else "linear")
    axes.set_xlim(lines[0].x[0] - 0.5, lines[0].x[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    if len(lines) + len(levels) > 1:
        axes.legend(fontsize=7)
