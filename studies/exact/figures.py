"""What the exact problems show, as figures."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo.files import save_figure
from drpo.report.figures import COLORS
from exact.checks import Theory
from exact.drift import UNBIASED
from exact.variance import MUS

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")
_STYLES = ("-", "--", ":")


def _line(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % 7], "linestyle": _STYLES[index // 7], "linewidth": 1.6}


def _save(figure: Figure, path: Path) -> None:
    save_figure(figure, path, metadata={"Software": None})


def _draw_variance(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    shown = ("shift 0.1, A > 0", "shift 0.1, A < 0")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, case in zip(grid, shown, strict=True):
        for i, v in enumerate(v for v in theory.variances if v.case == case):
            pairs = [(mu, y) for mu, y in zip(MUS, v.variance, strict=True) if y > 1e-30]
            if pairs:
                axes.loglog(*zip(*pairs, strict=True), label=v.objective, **_line(i))
        axes.set(title=case, xlabel="mu")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("variance of one draw's gradient")
    grid[1].legend(fontsize=7, ncols=2)
    figure.suptitle("A rare word that has risen by 0.1: who pays for it in variance (not drawn: silenced)")
    _save(figure, path)


def _draw_fixed_points(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes: Axes = figure.subplots()
    names = list(dict.fromkeys(p.objective for p in theory.fixed_points))
    for i, name in enumerate(names):
        for sign in (1.0, -1.0):
            mine = [p for p in theory.fixed_points if p.objective == name and p.advantage == sign]
            mu = [p.mu for p in mine]
            label = name if sign > 0 else None
            axes.plot(mu, [p.predicted for p in mine], label=label, **(_line(i) | {"alpha": 0.6}))
            for side, marker in (("below", "^"), ("above", "v")):
                axes.plot(mu, [getattr(p, side) for p in mine], marker, color=COLORS[i], markersize=5, fillstyle="none")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(xlabel="mu", ylabel="pi*", xlim=(0, 1), ylim=(0, 1))
    title = "Fixed points of one token: formula (lines),\nfound from below (^) and above (v); upper: A > 0"
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    _save(figure, path)


def _draw_bias(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(7.6, 5), layout="constrained")
    axes: Axes = figure.subplots()
    for i, d in enumerate(theory.drift):
        pairs = [(tv, b) for tv, b in zip(d.tv, d.relative, strict=True) if tv > 0 and b > UNBIASED]
        if pairs:
            axes.loglog(*zip(*pairs, strict=True), marker=".", label=d.objective, **_line(i))
    axes.set(xlabel="total variation between mu and pi", ylabel="|expected step - true| / |true|", ylim=(1e-6, 100))
    axes.set_title("Bias along a drift the way of the advantages (not drawn: exactly 0)", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.25)
    _save(figure, path)


def _draw_long_tail(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.subplots(1, 2)
    titles = ("The tail is noise", "The tail holds the best word")
    for axes, learnt, title in zip(grid, (theory.noisy, theory.meaningful), titles, strict=True):
        for i, found in enumerate(learnt):
            axes.plot(found.value, label=found.objective, **_line(i))
        axes.set(title=title, xlabel="rollouts", ylabel="true expected reward")
        axes.grid(alpha=0.25)
    grid[1].legend(fontsize=7, loc="upper left")
    _save(figure, path)


FIGURES: Mapping[str, Callable[[Theory, Path], None]] = {
    "exact_variance.png": _draw_variance,
    "exact_fixed_points.png": _draw_fixed_points,
    "exact_bias.png": _draw_bias,
    "exact_long_tail.png": _draw_long_tail,
}
"""File -> what draws it."""
