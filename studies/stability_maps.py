"""Maps of a comparison: final scores and collapses over learning rate and updates per rollout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo.files import save_figure
from drpo.lab.analysis import Condition, conditions
from drpo.lab.trial_result import Comparison

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")


def draw_maps(comparison: Comparison, task: str, title: str, path: Path) -> Path:
    """Draw a map per objective (columns) and sampler's precision (rows): colour and number are the mean final score.

    Below the number is the count of collapsed or diverged seeds, if any.

    Args:
        comparison: varies updates, learning rate and objective, and perhaps the sampler's precision.
        task: spec of the task whose trials are drawn.
        title: of the figure.
        path: of the PNG.
    """
    fields = comparison.regime_fields
    of_task = [c for c in conditions(comparison) if "task" not in fields or c.regime[fields.index("task")] == task]
    objectives = list(dict.fromkeys(c.objective for c in of_task))
    precisions = _values(of_task, fields, "rollout_precision")
    figure = Figure(figsize=(1.5 + 2.1 * len(objectives), 0.9 + 1.9 * len(precisions)), layout="constrained")
    panels = figure.subplots(len(precisions), len(objectives), squeeze=False, sharex=True, sharey=True)
    image = None
    for row, precision in enumerate(precisions):
        for column, objective in enumerate(objectives):
            here = [c for c in of_task if c.objective == objective and _of(c, fields, "rollout_precision") == precision]
            image = _panel(panels[row, column], here, of_task, fields)
            if row == 0:
                panels[row, column].set_title(objective, fontsize=9)
        panels[row, 0].set_ylabel(
            f"sampler {precision}\nupdates per rollout" if precision is not None else "updates per rollout", fontsize=9
        )
    for axes in panels[-1]:
        axes.set_xlabel("learning rate", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.8, label="final reward, mean over seeds")
    figure.suptitle(title)
    save_figure(figure, path)
    return path


def _panel(axes: Axes, here: Sequence[Condition], of_task: Sequence[Condition], fields: Sequence[str]) -> Any:
    rates = sorted({c.learning_rate for c in of_task})
    updates = _values(of_task, fields, "updates")
    table = np.full((len(updates), len(rates)), np.nan)
    for c in here:
        y, x = updates.index(_of(c, fields, "updates")), rates.index(c.learning_rate)
        table[y, x] = c.mean.value
        fallen = round(c.collapse.value * c.collapse.n)
        text = f"{c.mean.value:.2f}" + (f"\n{fallen}/{c.collapse.n} fell" if fallen else "")
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="black" if c.mean.value > 0.6 else "white")
    image = axes.imshow(table, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=7)
    axes.set_yticks(range(len(updates)), [str(u) for u in updates], fontsize=7)
    return image


def _of(c: Condition, fields: Sequence[str], name: str) -> Any:
    return c.regime[fields.index(name)] if name in fields else None


def _values(of_task: Sequence[Condition], fields: Sequence[str], name: str) -> list[Any]:
    return list(dict.fromkeys(_of(c, fields, name) for c in of_task))
