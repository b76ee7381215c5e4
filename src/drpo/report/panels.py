"""A run's curves as plain data: what a page's plots are drawn from, with the text that says the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drpo.objectives import caution, radii
from drpo.train.config import Run

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """One line of a panel.

    Args:
        name: in the legend.
        x: steps.
        y: a number for each.
        color: index into `palette.COLORS`.
        low: lower end of an interval for each, or None.
        high: upper end.
    """

    name: str
    x: Sequence[int]
    y: Sequence[float]
    color: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line.

    Args:
        name: in the legend.
        y: where.
    """

    name: str
    y: float


@dataclass(frozen=True)
class Panel:
    """One small plot over steps.

    Args:
        title: what it shows.
        unit: of the vertical axis.
        caption: how to read it.
        series: at least one, each with at least one number.
        levels: horizontal lines.
        log: whether the vertical axis is logarithmic.
    """

    title: str
    unit: str
    caption: str
    series: Sequence[Series]
    levels: Sequence[Level] = ()
    log: bool = False


def described(panel: Panel) -> str:
    """Say in words what a panel shows: each line's first and last number.

    Example:
        >>> described(Panel("Entropy", "nats", "", [Series("mean", [1, 2, 3], [1.5, 1.0, 0.25])]))
        'Entropy (nats). mean: 1.5 at step 1, 0.25 at step 3, between 0.25 and 1.5.'
    """
    lines = [
        f"{s.name}: {s.y[0]:.3g} at step {s.x[0]}, {s.y[-1]:.3g} at step {s.x[-1]}, "
        f"between {min(s.y):.3g} and {max(s.y):.3g}."
        for s in panel.series
    ]
    return f"{panel.title} ({panel.unit}). {' '.join([*lines, *(f'{v.name}: {v.y:g}.' for v in panel.levels)])}"


def plain(panel: Panel) -> dict[str, Any]:
    """Return a panel as JSON-like data, with its text."""
    return {**asdict(panel), "text": described(panel)}


def series(records: Records, key: str, name: str, color: int = 0) -> list[Series]:
    """Return the line of a metric over steps; none where no step has it."""
    found = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return [Series(name, [x for x, _ in found], [y for _, y in found], color)] if found else []


def run_panels(run: Run, metrics: Records, evaluations: Records) -> list[Panel]:
    """Return the curves of one run.

    Args:
        run: the configuration.
        metrics: of metrics.jsonl.
        evaluations: of evaluations.jsonl.

    Returns:
        The panels that have something to show.
    """

    def line(key: str, name: str, color: int = 0) -> list[Series]:
        return series(metrics, key, name, color)

    panels = [
        Panel("Training reward", "score", "Mean reward of the step's completions.", line("reward_mean", "mean")),
        _accuracy(evaluations),
        _shift(run, line("shift_p99", "99th percentile", 1) + line("shift_mean", "mean")),
        Panel(
            "Gradient weight w",
            "w",
            "1 is the plain policy gradient, 0 holds a token where it is, below 0 pulls it back.",
            line("weight_max", "largest", 1) + line("weight_mean", "mean") + line("weight_min", "smallest", 2),
            [Level("held", 0.0)],
        ),
        Panel(
            "Out of the region, held",
            "share of tokens",
            "Outside: the policy has left the region. Held: w is 0 or less.",
            line("outside", "outside", 1)
            + line("outside_low", "outside, below μ", 2)
            + line("outside_high", "outside, above μ", 3)
            + line("held", "held"),
        ),
        Panel(
            "Entropy",
            "nats",
            "Mean over trained tokens; low where there is little left to explore.",
            line("entropy", "mean"),
        ),
        Panel("Ratio", "π/μ", "1 on average, whatever the policy does, where μ is right.", line("ratio_mean", "mean")),
        Panel("KL(μ || π), k3", "nats", "How far the policy is from the sampler.", line("k3", "k3"), log=True),
        Panel(
            "Length",
            "tokens",
            "Completions that ended by themselves, and those that were cut.",
            line("length_terminated", "ended") + line("length_truncated", "cut", 1),
        ),
        Panel(
            "Groups without a signal",
            "share of groups",
            "Rewards that are all equal give no gradient: all wrong, all right, or alike in between.",
            line("frac_reward_zero_std", "rewards equal")
            + line("all_wrong", "all wrong", 1)
            + line("all_right", "all right", 2),
        ),
        Panel("Truncated", "share", "Completions cut at max_new_tokens.", line("truncated", "cut", 1)),
        Panel(
            "Gradient norm",
            "L2 norm",
            "Before clipping; the largest of the step's updates.",
            line("grad_norm", "norm"),
            [Level("clipped at", run.max_grad_norm)] if math.isfinite(run.max_grad_norm) else [],
        ),
    ]
    return [panel for panel in panels if panel.series]


def _shift(run: Run, lines: Sequence[Series]) -> Panel:
    reachable = caution(run.objective) is None
    low, high = radii(run.objective) or (None, None)
    sides = {"radius": low} if low == high else {"radius, falling": low, "radius, rising": high}
    return Panel(
        "Shift |π-μ|",
        "probability",
        "How far tokens have moved from the sampler."
        + ("" if reachable else " The region's border is beyond what any token can reach."),
        lines,
        [Level(name, radius) for name, radius in sides.items() if radius is not None],
        log=True,
    )


def _accuracy(evaluations: Records) -> Panel:
    known = [e for e in evaluations if e.get("accuracy") is not None]
    line = Series(
        "accuracy",
        [e["step"] for e in known],
        [e["accuracy"] for e in known],
        low=[e["low"] for e in known],
        high=[e["high"] for e in known],
    )
    shares = any(e["low"] is not None and math.isfinite(e["low"]) for e in known)  # else the scores have no interval
    caption = f"On problems that training never samples{', with 95 % intervals' if shares else ''}."
    return Panel("Held-out accuracy", "score", caption, [line] if known else [])
