"""The figures of a comparison: a facet for each regime; an objective looks the same in all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drpo.lab.analysis import Condition, best, conditions, difference, label
from drpo.lab.statistics import Interval
from drpo.lab.trial_result import Comparison, Trial
from drpo.report.bands import over_seeds, rounded, shown_steps, spread, student
from drpo.report.comparison_data import THRESHOLD
from drpo.report.figures import GREY, Figure, Plot, add_placed, band, brief, look, make_facets
from drpo.report.panels import PANELS

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

    def facet(self, c: Condition) -> int:
        """The number of the facet that a condition is drawn in."""
        return list(self.regimes).index(c.regime)

    def look(self, c: Condition) -> dict[str, Any]:
        """How a condition's objective is drawn."""
        return look(self.objectives.index(c.objective))

    def clip(self, values: Sequence[float]) -> list[float]:
        """Cut bounds at what a reward can be; nan stays nan."""
        return [float(y) for y in np.clip(values, *self.range)]


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
        "metrics": metric_plots(view),
    }


def reward_plot(view: View) -> Plot:
    """Return the training reward of every objective: its mean over seeds, Student's interval, and each seed."""
    figure = make_facets(list(view.regimes.values()), 2, 250, shared_yaxes="all")
    told, placed, n_steps = [], [], max(len(trial.rewards) for of_one in view.trials for trial in of_one)
    for c, trials in zip(view.chosen, view.trials, strict=True):
        values = over_seeds([trial.rewards for trial in trials], max(len(trial.rewards) for trial in trials))
        kept = shown_steps(values.shape[1])
        steps = [i + 1 for i in kept]
        mean, low, high = (rounded(column[kept]) for column in student(values))
        curve = (mean, view.clip(low), view.clip(high))
        seeds = seed_traces(view, c, steps, [row[kept] for row in values])
        placed += [(trace, view.facet(c)) for trace in (*curve_traces(view, c, steps, curve), *seeds)]
        first, last = brief(mean[0]), brief(mean[-1])
        told.append(f"{_named(view, c)}: {first} at step 1, {last} at step {steps[-1]}.")
    add_placed(figure, placed, 2)
    _one_legend(figure)
    figure.update_layout(hovermode="x unified").update_xaxes(title_text="step", tickformat="d")
    figure.update_yaxes(range=_aired(view.range)).update_yaxes(title_text="reward", col=1)
    thinned = shown_steps(n_steps)
    caption = f"Of {n_steps:,} steps every {thinned[1]}th is drawn." if len(thinned) < n_steps else ""
    return Plot("reward-plot", "Mean over seeds, with 95 % intervals", figure, " ".join(told), caption, wide=True)


def curve_traces(
    view: View, c: Condition, steps: Sequence[int], curve: Sequence[Sequence[float]]
) -> Iterator[dict[str, Any]]:
    """Yield the band and the mean of a condition's curve."""
    form = view.look(c)
    group = {"legendgroup": c.objective}
    yield band(steps, curve[1], curve[2], form["line"]["color"], name=c.objective, **group)
    mean = {"x": steps, "y": curve[0], "name": c.objective, "mode": "lines", "line": form["line"]}
    yield {**mean, "hovertemplate": "%{y:.3~g}", **group}


def seed_traces(view: View, c: Condition, steps: Sequence[int], rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the curve of each seed, which the legend switches on."""
    line = {"color": view.look(c)["line"]["color"], "width": 0.8}
    for row in rows:
        yield {
            "x": steps,
            "y": rounded(row),
            "name": "each seed",
            "legendgroup": "each seed",
            "legendrank": 2000,
            "visible": "legendonly",
            "mode": "lines",
            "line": line,
            "hoverinfo": "skip",
        }


def ends_plot(view: View) -> Plot:
    """Return where each objective ends: its seeds, their mean, and Student's interval."""
    figure, rows = _rows(view)
    told, placed = [], []
    for c in view.chosen:
        y = rows[c.regime].index(c.objective)
        mean, low, high = c.mean.value, *view.clip([c.mean.low, c.mean.high])
        traces = interval_traces(view, c, y, (mean, low, high), sorted(c.final.items()))
        placed += [(trace, view.facet(c)) for trace in traces]
        told.append(f"{_named(view, c)}: {said(c.mean)}.")
    add_placed(figure, placed, 1)
    figure.update_layout(showlegend=False).update_xaxes(range=_aired(view.range))
    figure.update_xaxes(title_text="end", row=len(view.regimes), col=1)
    return Plot("ends-plot", "Seeds, their mean, and its 95 % interval", figure, " ".join(told), wide=True)


def interval_traces(
    view: View, c: Condition, y: int, interval: tuple[float, float, float], seeds: Sequence[tuple[int, float]] = ()
) -> Iterator[dict[str, Any]]:
    """Yield a row: the mean as an upright stroke, its interval as a line, the seeds above it."""
    color, symbol = view.look(c)["line"]["color"], view.look(c)["marker"]["symbol"]
    mean, low, high = interval
    yield {
        "x": [mean],
        "y": [y],
        "name": c.objective,
        "mode": "markers",
        "marker": {"color": color, "symbol": "line-ns", "size": 15, "line": {"color": color, "width": 3}},
        "error_x": {"symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "width": 0, "thickness": 3},
        "customdata": [[brief(low), brief(high)]],
        "hovertemplate": "mean %{x:.3~f}<br>%{customdata[0]} to %{customdata[1]}",
    }
    if seeds:
        yield {
            "x": [value for _, value in seeds],
            "y": [y - _SEEDS_ABOVE] * len(seeds),
            "customdata": [seed for seed, _ in seeds],
            "name": c.objective,
            "mode": "markers",
            "marker": {"color": color, "symbol": symbol, "size": 8, "opacity": 0.85},
            "hovertemplate": "seed %{customdata}: %{x:.3~f}",
        }


def differences_plot(view: View) -> Plot:
    """Return by how much each objective ends above the first one, seed by seed."""
    figure, rows = _rows(view)
    references = {c.regime: c for c in view.chosen if c.objective == view.objectives[0]}
    told, placed = [], []
    for c in view.chosen:
        reference = references.get(c.regime, c)
        interval = difference(c, reference)
        if c is not reference and interval.n:
            bounds = (interval.value, interval.low, interval.high)
            traces = interval_traces(view, c, rows[c.regime].index(c.objective), bounds)
            placed += [(trace, view.facet(c)) for trace in traces]
            told.append(f"{_named(view, c)} less {reference.objective}: {said(interval)}.")
    add_placed(figure, placed, 1)
    figure.add_vline(x=0, line={"color": GREY, "width": 1.4, "dash": "dot"})
    title = f"end less that of {view.objectives[0]}"
    figure.update_layout(showlegend=False).update_xaxes(title_text=title, row=len(view.regimes), col=1)
    return Plot("differences-plot", "Mean difference, and its 95 % interval", figure, " ".join(told), wide=True)


def sweep_plot(view: View) -> Plot:
    """Return where each objective ends at every learning rate."""
    figure = make_facets(list(view.regimes.values()), 2, 250, shared_yaxes="all")
    rates = sorted({c.learning_rate for c in view.found})
    told, placed = [], []
    for c in view.chosen:
        line = sorted(
            (x for x in view.found if (x.regime, x.objective) == (c.regime, c.objective)), key=lambda x: x.learning_rate
        )
        told += [f"{_named(view, x)} at {x.learning_rate:g}: {said(x.mean)}." for x in line]
        placed.append((sweep_trace(view, c, line), view.facet(c)))
    add_placed(figure, placed, 2)
    _one_legend(figure)
    figure.update_xaxes(type="log", title_text="learning rate", tickvals=rates, ticktext=[f"{r:g}" for r in rates])
    figure.update_yaxes(range=_aired(view.range)).update_yaxes(title_text="end", col=1)
    return Plot(
        "sweep-plot", "Ends at every learning rate", figure, " ".join(told), "The large marker is the best.", wide=True
    )


def sweep_trace(view: View, chosen: Condition, line: Sequence[Condition]) -> dict[str, Any]:
    """Return the ends of an objective over the learning rates; objectives stand beside one another at a rate.

    Args:
        view: of the comparison.
        chosen: the best of the line; its marker is larger.
        line: by learning rate.
    """
    means, form = [c.mean.value for c in line], view.look(chosen)
    low, high = (view.clip([getattr(c.mean, end) for c in line]) for end in ("low", "high"))
    aside = 10 ** (0.014 * (view.objectives.index(chosen.objective) - (len(view.objectives) - 1) / 2))
    return {
        "x": [c.learning_rate * aside for c in line],
        "y": means,
        "name": chosen.objective,
        "legendgroup": chosen.objective,
        "mode": "lines+markers",
        "line": form["line"],
        "marker": form["marker"] | {"size": [12 if c is chosen else 7 for c in line]},
        "error_y": {
            "symmetric": False,
            "array": [b - y for b, y in zip(high, means, strict=True)],
            "arrayminus": [y - a for a, y in zip(low, means, strict=True)],
            "thickness": 1.3,
            "width": 3,
        },
        "customdata": [f"{c.learning_rate:g}" for c in line],
        "hovertemplate": "at %{customdata}: %{y:.3~f}",
    }


def metric_plots(view: View) -> list[Plot]:
    """Return the metrics of every objective over steps: their mean over seeds, from the lowest seed to the highest."""
    columns = 2 if len(view.regimes) > 1 else 1
    plots = []
    for key, (title, panel) in METRICS.items():
        figure = make_facets(list(view.regimes.values()), columns, 220, shared_yaxes="all")
        told, placed = [], []
        for c, trials in zip(view.chosen, view.trials, strict=True):
            curves = [trial.series.get(key, ()) for trial in trials]
            values = over_seeds(curves, max(map(len, curves)))
            kept = shown_steps(values.shape[1])
            curve = [rounded(column[kept]) for column in spread(values)]
            placed += [(trace, view.facet(c)) for trace in curve_traces(view, c, [i + 1 for i in kept], curve)]
            told.append(
                f"{_named(view, c)}: {brief(curve[0][0])} at first, {brief(curve[0][-1])} at last." if kept else ""
            )
        add_placed(figure, placed, columns)
        _one_legend(figure)
        figure.update_layout(hovermode="x unified").update_xaxes(title_text="step", tickformat="d")
        figure.update_yaxes(type="log" if panel.log else "linear").update_yaxes(title_text=panel.unit, col=1)
        plots.append(Plot(f"metric-{key}", title, figure, " ".join(told), panel.caption, wide=columns > 1))
    return plots


def said(interval: Interval) -> str:
    """Write a mean with its bounds.

    Example:
        >>> said(Interval(0.5, 0.25, 0.75, 3)), said(Interval(0.5, float("nan"), float("nan"), 1))
        ('0.5 (0.25 to 0.75)', '0.5, one seed')
    """
    known = interval.low == interval.low
    return brief(interval.value) + (f" ({brief(interval.low)} to {brief(interval.high)})" if known else ", one seed")


def _named(view: View, c: Condition) -> str:
    where = view.regimes[c.regime]
    return f"{c.objective}, {where}" if where else c.objective


def _rows(view: View) -> tuple[Figure, dict[tuple[Any, ...], list[str]]]:
    """A figure with a row for each objective of each regime, and which rows these are."""
    rows = {regime: [c.objective for c in view.chosen if c.regime == regime] for regime in view.regimes}
    figure = make_facets(list(view.regimes.values()), 1, 40 + 30 * max(map(len, rows.values())), shared_xaxes="all")
    for i, names in enumerate(rows.values()):
        ticks: dict[str, Any] = {
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [len(names) - 0.5, -0.65],
        }
        figure.update_yaxes(**ticks, showgrid=False, zeroline=False, row=i + 1, col=1)
    figure.update_xaxes(showticklabels=True)
    return figure, rows


def _one_legend(figure: Figure) -> None:
    """Name each group once."""
    told = set()
    for trace in figure.data:
        if trace.fill != "toself":
            trace.showlegend = trace.legendgroup not in told
            told.add(trace.legendgroup)


def _aired(span: tuple[float, float]) -> list[float]:
    air = 0.05 * (span[1] - span[0])
    return [span[0] - air, span[1] + air]
