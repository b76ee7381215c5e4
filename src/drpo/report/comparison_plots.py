"""The figures of a comparison: a facet for each regime; an objective looks the same in all of them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from drpo.lab.analysis import Condition, best, conditions, difference, label
from drpo.lab.statistics import Interval
from drpo.lab.trial_result import Comparison, Trial
from drpo.report.comparison_data import THRESHOLD
from drpo.report.figures import GREY, Figure, Plot, brief, look, make_facets
from drpo.report.panels import PANELS, Line, Panel, curves, number

METRICS = {
    key: (panel.title if len(panel.lines) == 1 else f"{panel.title}: {name}", panel)
    for panel in PANELS
    for key, name in panel.lines.items()
    if key in ("prob_diff_p99", "out_of_region", "masked", "ratio_max", "k3", "entropy", "grad_norm", "truncated")
}
"""Key of a record -> its title, and the panel that says how to read it."""
_SEEDS_ABOVE = 0.27
"""Of a row, where the seeds stand: on the line they would hide each other."""


@dataclass(frozen=True)
class View:
    """A comparison as its figures show it.

    Args:
        regimes: values -> label, in order.
        objectives: in order.
        found: every condition with a result.
        chosen: the best learning rate of each objective in each regime.
        trials: of each chosen condition, in the same order.
        range: of rewards: at least from 0 to 1.
    """

    regimes: Mapping[tuple[Any, ...], str]
    objectives: Sequence[str]
    found: Sequence[Condition]
    chosen: Sequence[Condition]
    trials: Sequence[Sequence[Trial]]
    range: tuple[float, float]

    def curves(self, id: str, panel: Panel, lines: Sequence[Line], axis: Mapping[str, Any] | None = None) -> Plot:
        """The figure of a line for each chosen condition, in the facet of its regime."""
        facets: dict[str, list[Line]] = {name: [] for name in self.regimes.values()}
        for c, line in zip(self.chosen, lines, strict=True):
            facets[self.regimes[c.regime]].append(line)
        return replace(curves(id, panel, facets, names=self.objectives, axis=axis), wide=True)

    def clip(self, interval: Interval) -> tuple[float, float]:
        """The bounds, cut at what a reward can be; nan where there are none."""
        low, high = np.clip([interval.low, interval.high], *self.range)
        return float(low), float(high)


def view_of(comparison: Comparison) -> View:
    """Return a comparison as its figures show it; regimes without a result are left out."""
    found = conditions(comparison, THRESHOLD)
    chosen = best(found)
    of_regime = dict(comparison.by_regime())
    trials = [
        [x for x in of_regime[c.regime] if x.over and (x.objective, x.learning_rate) == (c.objective, c.learning_rate)]
        for c in chosen
    ]
    rewards = [x for of_one in trials for trial in of_one for x in trial.rewards]
    return View(
        {c.regime: label(c.regime, comparison.regime_fields) for c in chosen},
        comparison.objectives,
        found,
        chosen,
        trials,
        (min([0.0, *rewards]), max([1.0, *rewards])),
    )


def comparison_plots(view: View) -> dict[str, list[Plot]]:
    """Return section -> its figures; none where there is no result, or for rates where there is one rate."""
    if not view.chosen:
        return {name: [] for name in ("reward", "ends", "differences", "sweep", "metrics")}
    several = len({c.learning_rate for c in view.found}) > 1
    return {
        "reward": [reward_plot(view)],
        "ends": [ends_plot(view)],
        "differences": [differences_plot(view)] if len(view.objectives) > 1 else [],
        "sweep": [sweep_plot(view)] if several else [],
        "metrics": [metric_plot(view, key) for key in METRICS],
    }


def reward_plot(view: View) -> Plot:
    """Return the training reward of every objective."""
    lines = [over_seeds(c.objective, [t.rewards for t in of_one]) for c, of_one in _shown(view)]
    return view.curves("reward-plot", Panel("Mean over seeds, lowest to highest", "reward", "", {}), lines)


def metric_plot(view: View, key: str) -> Plot:
    """Return a metric of every objective over steps."""
    title, panel = METRICS[key]
    lines = [over_seeds(c.objective, [t.series.get(key, ()) for t in of_one]) for c, of_one in _shown(view)]
    return view.curves(f"metric-{key}", replace(panel, title=title), lines)


def _shown(view: View) -> Iterator[tuple[Condition, Sequence[Trial]]]:
    return zip(view.chosen, view.trials, strict=True)


def over_seeds(name: str, series: Sequence[Sequence[float | None]]) -> Line:
    """Return the curves of several seeds as one: their mean at every step, from the lowest to the highest.

    Example:
        >>> line = over_seeds("drpo", [[0.5, None, None], [1.0, 2.0]])
        >>> line.x, line.y, line.low, line.high
        (range(1, 4), [0.75, 2.0, None], [0.5, 2.0, None], [1.0, 2.0, None])
    """
    values = np.full((len(series), max(map(len, series))), np.nan)
    for row, curve in zip(values, series, strict=True):
        row[: len(curve)] = [np.nan if x is None else x for x in curve]
    values[~np.isfinite(values)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step for which no seed has a number
        columns = [reduce(values, axis=0) for reduce in (np.nanmean, np.nanmin, np.nanmax)]
    return Line(name, range(1, values.shape[1] + 1), *([number(float(f"{x:.5g}")) for x in c] for c in columns))


def sweep_plot(view: View) -> Plot:
    """Return where each objective ends at every learning rate, with its interval."""
    rates = sorted({c.learning_rate for c in view.found})
    ticks = {
        "type": "log",
        "title": {"text": "learning rate"},
        "tickvals": rates,
        "ticktext": [f"{r:g}" for r in rates],
    }
    lines = []
    for chosen in view.chosen:
        same = [c for c in view.found if (c.regime, c.objective) == (chosen.regime, chosen.objective)]
        same.sort(key=lambda c: c.learning_rate)
        low, high = zip(*(map(number, view.clip(c.mean)) for c in same), strict=True)
        lines.append(Line(chosen.objective, [c.learning_rate for c in same], [c.mean.value for c in same], low, high))
    return view.curves("sweep-plot", Panel("Ends at every learning rate", "end", "", {}), lines, ticks)


def ends_plot(view: View) -> Plot:
    """Return where each objective ends: its seeds, their mean, and Student's interval."""
    rows = {id(c): interval_traces(view, c, c.mean.value, *view.clip(c.mean), c.final) for c in view.chosen}
    figure = rows_figure(view, rows, "end")
    air = 0.05 * (view.range[1] - view.range[0])
    figure.update_xaxes(range=[view.range[0] - air, view.range[1] + air])
    return Plot("ends-plot", "Seeds, their mean, and its 95 % interval", figure, wide=True)


def differences_plot(view: View) -> Plot:
    """Return by how much each objective ends above the first one, seed by seed."""
    first = {c.regime: c for c in view.chosen if c.objective == view.objectives[0]}
    rows = {}
    for c in view.chosen:
        d = difference(c, first.get(c.regime, c))
        if d.n and c.objective != view.objectives[0] and c.regime in first:
            rows[id(c)] = interval_traces(view, c, d.value, d.low, d.high)
    figure = rows_figure(view, rows, f"end less that of {view.objectives[0]}")
    figure.add_vline(x=0, line={"color": GREY, "width": 1.4, "dash": "dot"})
    return Plot("differences-plot", "Mean difference, and its 95 % interval", figure, wide=True)


def interval_traces(
    view: View, c: Condition, mean: float, low: float, high: float, seeds: Mapping[int, float] | None = None
) -> list[dict[str, Any]]:
    """Return a row: the mean as an upright stroke, its interval as a line, the seeds above it."""
    form = look(view.objectives.index(c.objective))
    color, y = form["line"]["color"], [x.objective for x in view.chosen if x.regime == c.regime].index(c.objective)
    stroke = {
        "x": [mean],
        "y": [y],
        "marker": {"color": color, "symbol": "line-ns", "size": 15, "line": {"color": color, "width": 3}},
        "error_x": {"symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "width": 0, "thickness": 3},
        "customdata": [[brief(low), brief(high)]],
        "hovertemplate": "mean %{x:.3~f}<br>%{customdata[0]} to %{customdata[1]}",
    }
    known = dict(sorted((seeds or {}).items()))
    dots = {
        "x": list(known.values()),
        "y": [y - _SEEDS_ABOVE] * len(known),
        "customdata": list(known),
        "marker": form["marker"] | {"size": 8, "opacity": 0.85},
        "hovertemplate": "seed %{customdata}: %{x:.3~f}",
    }
    return [{"name": c.objective, "mode": "markers"} | trace for trace in ((stroke, dots) if known else (stroke,))]


def rows_figure(view: View, traces: Mapping[int, Sequence[Mapping[str, Any]]], title: str) -> Figure:
    """Return a figure with a row for each objective of each regime.

    Args:
        view: of the comparison.
        traces: id of a chosen condition -> those of its row.
        title: of the axis.
    """
    names = [[c.objective for c in view.chosen if c.regime == regime] for regime in view.regimes]
    facets = {
        name: [t for c in view.chosen if c.regime == regime for t in traces.get(id(c), ())]
        for regime, name in view.regimes.items()
    }
    figure = make_facets(facets, 1, 40 + 30 * max(map(len, names)), shared_xaxes="all")
    for i, of_regime in enumerate(names, 1):
        ticks = {"tickvals": list(range(len(of_regime))), "ticktext": of_regime, "range": [len(of_regime) - 0.5, -0.65]}
        figure.update_yaxes(**ticks, showgrid=False, zeroline=False, row=i, col=1)
    figure.update_xaxes(showticklabels=True).update_xaxes(title_text=title, row=len(names), col=1)
    return figure.update_layout(showlegend=False)
