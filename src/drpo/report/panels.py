"""Curves over steps: which metrics are drawn, how they are named, and the figure of each panel."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drpo.objectives import caution, radii
from drpo.report.figures import Plot, band, brief, level, log_axis, look, make_facets, step_axis, upright
from drpo.terminal import Sheet
from drpo.train.config import Run
from drpo.train.metric_tables import MOST_TURNS, REWARD_PARTS

Records = Sequence[Mapping[str, Any]]
Levels = Sequence[tuple[str, float]]
"""Name and height of horizontal lines."""
MOST_POINTS = 400
"""Of a longer line the least and the greatest of every few steps are drawn, so that no spike is lost."""


@dataclass(frozen=True)
class Panel:
    """Metrics of a step that are drawn together.

    Args:
        title: what they show.
        unit: of the vertical axis.
        caption: how to read it.
        lines: name of a metric, as records have it -> name of its line.
        log: whether the vertical axis is logarithmic.
    """

    title: str
    unit: str
    caption: str
    lines: Mapping[str, str]
    log: bool = False


REWARD = "reward_mean"
PROB_DIFF, WEIGHT, NORM = "Probability difference |π-μ|", "Gradient weight w", "Gradient norm"
PANELS = (
    Panel("Training reward", "score", "Mean reward of the step's completions.", {REWARD: "mean"}),
    Panel(
        PROB_DIFF,
        "probability",
        "How far tokens have moved from the sampler.",
        {"prob_diff_p99": "99th percentile", "prob_diff_mean": "mean"},
        log=True,
    ),
    Panel(
        "|π-μ| by turn",
        "probability",
        "Mean over the tokens of each turn of episodes in environments.",
        {f"prob_diff_mean/turn_{turn}": f"turn {turn}" for turn in range(1, MOST_TURNS + 1)},
        log=True,
    ),
    Panel(
        WEIGHT,
        "w",
        "1 is the plain policy gradient, 0 masks a token, below 0 pulls it back.",
        {"weight_max": "largest", "weight_mean": "mean", "weight_min": "smallest"},
    ),
    Panel(
        "Out of the region",
        "share of tokens",
        "Of the objective's own region, where it has one. Masked: the gradient weight w is 0 or less.",
        {"out_of_region": "out of region", "masked": "masked"},
    ),
    Panel(
        "Ratio π/μ",
        "π/μ",
        "The mean is 1, whatever the policy does, where μ is right.",
        {"ratio_max": "largest", "ratio_mean": "mean"},
        log=True,
    ),
    Panel("KL(μ || π)", "nats", "How far the policy is from the sampler.", {"k3": "k3 estimate"}, log=True),
    Panel(
        "Entropy",
        "nats",
        "Mean over trained tokens; low where there is little left to explore.",
        {"entropy": "mean"},
    ),
    Panel(
        "Length",
        "tokens",
        "Completions that ended by themselves, and those that were cut.",
        {"length_terminated": "ended", "length_truncated": "cut"},
    ),
    Panel(
        "Turns and tools",
        "per episode",
        "Means over the step's episodes. Done: the share that the environment ended; a limit ended the others. Branch: "
        "the history was rendered anew.",
        {
            "turns": "turns",
            "calls": "calls",
            "failed_calls": "failed calls",
            "branches": "branches",
            "episodes_done": "done",
        },
    ),
    Panel("Length of a turn", "tokens", "Sampled tokens, mean over the step's turns.", {"turn_tokens": "mean"}),
    Panel("Truncated", "share of completions", "Cut at max_new_tokens.", {"truncated": "cut"}),
    Panel(
        "Groups and their signal",
        "share of groups",
        "With a signal: a trained token's advantage is not 0. An advantage that compares a group's samples is 0 where "
        "their rewards are equal: all wrong, all correct, or alike in between.",
        {
            "groups_with_signal": "with a signal",
            "frac_reward_zero_std": "rewards equal",
            "groups_all_wrong": "all wrong",
            "groups_all_correct": "all correct",
        },
    ),
    Panel(
        "Curriculum",
        "share of problems",
        "Rollouts are drawn from the active ones; easy ones have retired, hard ones wait, by their measured pass rate.",
        {
            "curriculum_active": "active",
            "curriculum_easy": "easy",
            "curriculum_hard": "hard",
            "curriculum_drawn": "drawn so far",
        },
    ),
    Panel(NORM, "L2 norm", "Before clipping; the largest of the step's updates.", {"grad_norm": "norm"}),
    Panel(
        "Critic: explained variance",
        "share of the returns' variance",
        "1 is perfect, 0 no better than a constant; below 0 the critic is worse than that.",
        {"explained_variance": "explained"},
    ),
    Panel(
        "Critic: loss", "value loss", "On the step's last batch, in its last update.", {"value_loss": "loss"}, log=True
    ),
    Panel("Critic: gradient norm", "L2 norm", "Before clipping; the largest of the step.", {"value_grad_norm": "norm"}),
)
"""The curves of a run, in order."""


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Args:
        name: in the legend.
        x: steps, or whatever else it is drawn over.
        y: a finite number for each, None where there is none: the line has a gap there.
        low, high: ends of an interval for each, or None.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    @property
    def known(self) -> list[float]:
        """The numbers that it has."""
        return [y for y in self.y if y is not None]


def number(value: Any) -> float | None:
    """Return a finite number of a record, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def lines_of(panel: Panel, metrics: Records) -> list[Line]:
    """Return the lines of a panel for which some step has a number."""
    steps = [m["step"] for m in metrics]
    lines = [Line(name, steps, [number(m.get(key)) for m in metrics]) for key, name in panel.lines.items()]
    return [line for line in lines if line.known]


def parts_panel(metrics: Records) -> Panel:
    """Return the panel of what the reward consists of: a line for each part that a step has."""
    keys = sorted({key for record in metrics for key in record if key.startswith(REWARD_PARTS)})
    lines = {key: key.removeprefix(REWARD_PARTS) for key in keys}
    return Panel("Parts of the reward", "score", "Mean of each part over the completions that have it.", lines)


def held_out_line(evaluations: Records) -> Line:
    """Return the held-out mean reward over steps, with its intervals."""
    columns = {key: [number(e.get(key)) for e in evaluations] for key in ("reward_mean", "low", "high")}
    return Line(
        "mean reward", [e["step"] for e in evaluations], columns["reward_mean"], columns["low"], columns["high"]
    )


def held_out_part_lines(evaluations: Records) -> list[Line]:
    """Return a line over steps for each part of the held-out reward."""
    parts = [e.get("reward_parts", {}) for e in evaluations]
    steps = [e["step"] for e in evaluations]
    return [
        Line(name, steps, [number(part.get(name)) for part in parts]) for name in sorted({n for p in parts for n in p})
    ]


def drawn_lines(run: Run, metrics: Records, evaluations: Records) -> list[tuple[Panel, list[Line], Levels]]:
    """Return the panels of a run that have something to show: each with its lines and its horizontal lines."""
    held_out = held_out_line(evaluations)
    interval = ", with 95 % intervals" if sum(x is not None for x in held_out.low or ()) > 1 else ""
    caption = f"On problems that training never samples{interval}."
    drawn = [(panel, lines_of(panel, metrics)) for panel in (PANELS[0], parts_panel(metrics), *PANELS[1:])]
    drawn.insert(1, (Panel("Held-out reward", "score", caption, {}), [held_out] if held_out.known else []))
    caption = "Mean of each part over the completions of held-out problems that have it."
    drawn.insert(3, (Panel("Parts of the held-out reward", "score", caption, {}), held_out_part_lines(evaluations)))
    return [(panel, lines, levels(panel, run)) for panel, lines in drawn if lines]


def levels(panel: Panel, run: Run) -> Levels:
    """Return the name and the height of a panel's horizontal lines."""
    if panel.title == WEIGHT:
        return [("masked", 0.0)]
    if panel.title == PROB_DIFF and caution(run.objective.loss) is None:
        return [("radius", radius) for radius in sorted({*(radii(run.objective.loss) or ())})]
    if panel.title == NORM and math.isfinite(run.optimizer.max_grad_norm):
        return [("clipped at", run.optimizer.max_grad_norm)]
    return []


def thinned(y: Sequence[float | None], most: int = MOST_POINTS) -> list[int]:
    """Return which points of a line are drawn: all, or the least and the greatest of every k steps, and a gap's first.

    Example:
        >>> thinned([0.0, 9.0, 1.0, 2.0, None, None, -5.0, 3.0], most=4)
        [0, 1, 4, 6, 7]
    """
    if len(y) <= most:
        return list(range(len(y)))
    size = 2 * -(-len(y) // most)
    kept: set[int] = set()
    for start in range(0, len(y), size):
        known = [(value, i) for i, value in enumerate(y[start : start + size], start) if value is not None]
        gap = [i for i, value in enumerate(y[start : start + size], start) if value is None]
        kept |= {*gap[:1], *([min(known)[1], max(known)[1]] if known else [])}
    return sorted({*kept, len(y) - 1})


def curves(
    id: str,
    panel: Panel,
    facets: Mapping[str, Sequence[Line]],
    flat: Levels = (),
    names: Sequence[str] = (),
    axis: Mapping[str, Any] | None = None,
    chapters: Sequence[float] = (),
) -> Plot:
    """Return the figure of a panel: its lines, with a band where they have intervals.

    Args:
        id: of its element.
        panel: what it is.
        facets: title of a plot -> at least one line; a single plot may have an empty title.
        flat: name and height of horizontal lines.
        names: of the lines in the order of their colours; else as they come.
        axis: the horizontal one; None for steps.
        chapters: where vertical lines stand.
    """
    every = [line for lines in facets.values() for line in lines]
    order = list(dict.fromkeys([*names, *(line.name for line in every)]))
    steps = [x for line in every for x in line.x]
    axis = axis or step_axis(steps)
    span = axis.get("range", (min(steps), max(steps)))
    columns = 2 if len(facets) > 1 else 1
    drawn: dict[str, list[dict[str, Any]]] = {title: [] for title in facets}
    named: set[str] = set()
    for title, lines in facets.items():
        for line in lines:
            drawn[title] += line_traces(line, order.index(line.name), line.name not in named)
            named.add(line.name)
        drawn[title] += [level(span, y, f"{name} {brief(y)}") for name, y in flat]
    vertical = log_axis(y for line in every for y in line.y) if panel.log else {"nticks": 6}
    figure = make_facets(drawn, columns, 240, shared_yaxes="all")
    figure.update_layout(hovermode="x unified", showlegend=len(named) + len(flat) > 1)
    if chapters:
        figure.update_layout(shapes=[upright(x) for x in chapters])
    figure.update_xaxes(**axis).update_yaxes(**vertical).update_yaxes(title_text=panel.unit, col=1)
    return Plot(id, panel.title, figure, panel.caption, wide=columns > 1)


def line_traces(line: Line, i: int, named: bool = True) -> list[dict[str, Any]]:
    """Return a line as plotly draws it, after the band of its interval; its points are small, so that one without
    neighbours is seen.

    Args:
        line: to draw.
        i: its colour and dash.
        named: whether it is the one of its name that the legend shows.
    """
    kept = thinned(line.y)
    form, group = look(i), {"name": line.name, "legendgroup": line.name}
    x = [line.x[k] for k in kept]
    trace = {
        "x": x,
        "y": [line.y[k] for k in kept],
        "mode": "lines+markers",
        "hovertemplate": "%{y:.4~g}",
        "line": form["line"],
        "marker": form["marker"] | {"size": 6 if len(line.known) <= 30 else 2.5},
        "showlegend": named,
    }
    if line.low is None or line.high is None:
        return [group | trace]
    low, high = ([end[k] for k in kept] for end in (line.low, line.high))
    return [group | band(x, low, high, form["line"]["color"]), group | trace]


def numbers(drawn: Sequence[tuple[Panel, Sequence[Line], Levels]]) -> Sheet:
    """Return a row for each line of the panels: name, unit, first, last, least, greatest, and steps with a number."""
    rows = []
    for panel, lines, _ in drawn:
        for line in lines:
            shown = map(brief, (line.known[0], line.known[-1], min(line.known), max(line.known)))
            rows.append((f"{panel.title}: {line.name}", panel.unit, *shown, f"{len(line.known)} of {len(line.x)}"))
    head = ("curve", "unit", "first", "last", "least", "greatest", "steps")
    return Sheet("The curves in numbers", head, tuple(rows))
