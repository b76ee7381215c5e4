"""Figures of the reports: one template for all of them, and JSON in which no text is markup.

A figure has no colour of its own for text and ground: the page's style sheet gives both, in light, dark and print.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from drpo.lazily import lazily

plotly = lazily("plotly")

Figure = Any
"""`plotly.graph_objects.Figure`, which is imported where the first one is made."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#C26A9B", "#A87400", "#2F94D0", "#77818C")
"""After Okabe and Ito's palette: apart for colour-blind eyes, and plain to see on white and on a dark page."""
GREY = "#77818C"
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
_CLEAR, _FAINT = "rgba(0,0,0,0)", "rgba(127,127,127,0.22)"
_AXIS = {
    "gridcolor": _FAINT,
    "zerolinecolor": _FAINT,
    "automargin": True,
    "exponentformat": "power",
    "title": {"standoff": 6},
}
TEMPLATE = {
    "layout": {
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {"family": "system-ui, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif", "size": 12},
        "margin": {"l": 48, "r": 10, "t": 24, "b": 38},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}, "entrywidth": 0},
        "hovermode": "closest",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}


def log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """Return a logarithmic axis of these values: plain numbers where two decades or fewer are spanned.

    There plotly writes a digit alone for every line between two powers of ten, too close to be read.

    Example:
        >>> log_axis([0.02, 0.2])["dtick"], "dtick" in log_axis([1e-5, 1.0])
        ('D2', False)
    """
    known = [value for value in values if value is not None and value > 0]
    span = max(known) / min(known) if known else math.inf
    wide = {"type": "log", "nticks": 6}
    return wide if span > 100 else {**wide, "tickformat": ".3~g", **({"dtick": "D2"} if span >= 5 else {})}


def step_axis(steps: Sequence[float]) -> dict[str, Any]:
    """Return the axis of these steps: whole numbers alone, though they be few.

    Args:
        steps: at least one.

    Example:
        >>> step_axis([1, 2])["range"], "range" in step_axis([1, 100])
        ([0.5, 2.5], False)
    """
    axis = {"title": {"text": "step"}, "tickformat": "d", "nticks": 6}
    first, last = min(steps), max(steps)
    return axis if last - first > 5 else {**axis, "dtick": 1, "range": [first - 0.5, last + 0.5]}


@dataclass(frozen=True)
class Plot:
    """A figure with what the page says of it.

    Args:
        id: of its element.
        title: what it shows.
        figure: to draw.
        caption: how to read it.
        wide: whether it takes up two columns of the page.
    """

    id: str
    title: str
    figure: Figure
    caption: str = ""
    wide: bool = False


@cache
def template() -> dict[str, Any]:
    """Return the template of all figures, ours over plotly's own; a page holds it once and gives it to each figure."""
    figure = plotly.graph_objects.Figure().update_layout(template=TEMPLATE)
    whole: dict[str, Any] = figure.layout.template.to_plotly_json()
    return whole


def make_figure(traces: Iterable[Mapping[str, Any]], height: int, **layout: Any) -> Figure:
    """Return a figure without a template, which the page adds.

    Args:
        traces: each with its "type"; a line or points without.
        height: in pixels; the width is that of its element.
        layout: plotly's, by name.
    """
    drawn = [{"type": "scatter", **trace} for trace in traces]
    # At once: `update_layout` takes as long as all else of a report.
    return plotly.graph_objects.Figure(data=drawn, layout={"template": "none", "height": height, **layout})


def make_facets(facets: Mapping[str, Iterable[Mapping[str, Any]]], columns: int, height: int, **options: Any) -> Figure:
    """Return a figure of several plots, row by row.

    Args:
        facets: title of a plot, which may be empty -> its traces.
        columns: most plots in a row.
        height: of a row, in pixels.
        options: of plotly's `make_subplots`.
    """
    columns = min(columns, len(facets))
    rows = math.ceil(len(facets) / columns)
    total = rows * height + (60 if any(facets) else 0)
    titled = {"margin": {"t": 44}, "legend": {"y": 1 + 22 / total}} if any(facets) else {}
    layout = {"template": "none", "height": total, **titled}
    figure = plotly.graph_objects.Figure(layout=layout).set_subplots(
        rows, columns, subplot_titles=list(facets), vertical_spacing=min(0.3, 76 / total), **options
    )
    placed = [({"type": "scatter", **trace}, i) for i, traces in enumerate(facets.values()) for trace in traces]
    figure.add_traces(
        [trace for trace, _ in placed],
        rows=[i // columns + 1 for _, i in placed],
        cols=[i % columns + 1 for _, i in placed],
    )
    figure.update_annotations(font_size=12)
    return figure


def look(i: int) -> dict[str, Any]:
    """Return how the i-th of several is drawn: no two of 28 have both the colour and the dash of another."""
    color, n = COLORS[i % len(COLORS)], len(COLORS)
    return {
        "line": {"color": color, "dash": DASHES[i % len(DASHES)], "width": 2},
        "marker": {"color": color, "symbol": SYMBOLS[i % n]},
    }


def band(x: Sequence[float], low: Sequence[float | None], high: Sequence[float | None], color: str) -> dict[str, Any]:
    """Return the ground between two curves; where there are no bounds it is left out.

    Args:
        x: steps.
        low, high: a bound for each, or None.
        color: of the ground.
    """
    there = [(t, a, b) for t, a, b in zip(x, low, high, strict=True) if a is not None and b is not None]
    steps = [t for t, _, _ in there]
    return {
        "x": steps + steps[::-1],
        "y": [b for _, _, b in there] + [a for _, a, _ in there][::-1],
        "fill": "toself",
        "mode": "lines",
        "line": {"width": 0},
        "fillcolor": f"{color}26",
        "hoverinfo": "skip",
        "showlegend": False,
    }


def level(span: Sequence[float], y: float, name: str) -> dict[str, Any]:
    """Return a horizontal line over a span of the axis."""
    line = {"color": GREY, "width": 1.2, "dash": "dot"}
    return {"x": list(span), "y": [y, y], "name": name, "mode": "lines", "line": line, "hoverinfo": "skip"}


def upright(x: float) -> dict[str, Any]:
    """Return a vertical line through a figure of one plot."""
    line = {"color": GREY, "width": 1.2, "dash": "dash"}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def brief(value: float | None) -> str:
    """Write a number to three digits; a dash for one that is not there.

    Example:
        >>> brief(0.123456), brief(-2.0), ascii(brief(None))
        ('0.123', '-2', "'\\\\u2013'")
    """
    return "\u2013" if value is None or not math.isfinite(value) else f"{value:.3g}"


def plain(value: Any) -> Any:
    """Return a figure's JSON with every text as text: plotly reads a little HTML in names, titles and labels.

    Only hover templates, which no record writes, keep their markup.

    Example:
        >>> plain({"name": "<b>x</b> & y", "hovertemplate": "%{y}<extra></extra>"})
        {'name': '&lt;b>x&lt;/b> &amp; y', 'hovertemplate': '%{y}<extra></extra>'}
    """
    if isinstance(value, str):
        return value.replace("&", "&amp;").replace("<", "&lt;")
    if isinstance(value, Mapping):
        return {k: v if k == "hovertemplate" else plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, Sequence) else value
