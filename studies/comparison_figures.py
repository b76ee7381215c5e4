"""Figures of a comparison: training curves per regime, final scores with intervals, and sweeps of the learning rate."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from drpo.files import save_figure
from drpo.lab.analysis import Condition, best, conditions, label
from drpo.lab.trial_result import Comparison
from drpo.report.figures import COLORS

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")
STYLES = ("-", "--", "-.", ":")


def draw_curves(comparison: Comparison, path: Path) -> Path:
    """Draw the training reward of every objective, one panel per regime: mean over seeds, each seed thin behind it.

    Each objective is shown at its best learning rate.
    """
    chosen = best(conditions(comparison))
    regimes = list(dict.fromkeys(c.regime for c in chosen))
    figure = Figure(figsize=(6.2 * len(regimes), 4.4), layout="constrained")
    panels = figure.subplots(1, len(regimes), squeeze=False, sharey=True)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        trials = dict(comparison.by_regime())[regime]
        for c in (c for c in chosen if c.regime == regime):
            of_one = [x for x in trials if x.over and (x.objective, x.learning_rate) == (c.objective, c.learning_rate)]
            _curve(axes, [x.rewards for x in of_one], c.objective, comparison.objectives.index(c.objective))
        axes.set(title=label(regime, comparison.regime_fields), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("training reward")
    figure.suptitle(f"{comparison.name}: mean over seeds (thick), every seed (thin)")
    save_figure(figure, path)
    return path


def _curve(axes: Axes, curves: Sequence[Sequence[float]], name: str, index: int) -> None:
    color, style = COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]
    steps = range(1, min(map(len, curves)) + 1)
    for curve in curves:
        axes.plot(steps, curve[: len(steps)], color=color, linewidth=0.5, alpha=0.4)
    mean = np.mean([curve[: len(steps)] for curve in curves], axis=0)
    axes.plot(steps, mean, style, color=color, linewidth=1.9, label=name)


def draw_finals(comparison: Comparison, path: Path) -> Path:
    """Draw where each objective ends in every regime: the seeds, their mean, and Student's 95 % interval."""
    chosen = best(conditions(comparison))
    regimes = list(dict.fromkeys(c.regime for c in chosen))
    tallest = max(sum(c.regime == r for c in chosen) for r in regimes)
    figure = Figure(figsize=(5.6 * len(regimes), 1.2 + 0.38 * tallest), layout="constrained")
    panels = figure.subplots(1, len(regimes), squeeze=False, sharex=True)[0]
    for axes, regime in zip(panels, regimes, strict=True):
        here = [c for c in chosen if c.regime == regime][::-1]
        for y, c in enumerate(here):
            low, high = np.clip([c.mean.low, c.mean.high], 0, 1)
            axes.plot([low, high], [y, y], color=COLORS[0], linewidth=2)
            axes.plot(list(c.final.values()), [y] * len(c.final), "o", color=COLORS[1], alpha=0.7, markersize=4)
            axes.plot([c.mean.value], [y], "|", color=COLORS[0], markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(here)), [_named(c, chosen) for c in here], fontsize=8)
        axes.set(title=label(regime, comparison.regime_fields), xlim=(-0.02, 1.02))
        axes.grid(axis="x", alpha=0.25)
    figure.suptitle("where each ends: seeds (dots), mean, Student's 95 % interval")
    save_figure(figure, path)
    return path


def _named(c: Condition, chosen: Sequence[Condition]) -> str:
    rates = {x.learning_rate for x in chosen}
    return c.objective if len(rates) == 1 else f"{c.objective}, {c.learning_rate:g}"
