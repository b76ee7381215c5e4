"""Tables and the figure of what routing replay does, from the results of routing_replay.py."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo.files import save_figure
from drpo.lab.statistics import Interval, paired_difference, t_interval
from drpo.report.figures import COLORS
from markdown_tables import markdown

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")

RESULTS = Path(__file__).resolve().parent / "results" / "routing_replay.json"
Record = Mapping[str, Any]
SHOWN = {"reward_mean": "training reward", "k3": "k3, nats", "prob_diff_mean": "mean |pi - mu|"}


@cache
def read() -> Mapping[str, Sequence[Record]]:
    """Read the committed results, by part."""
    parts: Mapping[str, Sequence[Record]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return parts


# ---- mismatch ----


def precisions() -> str:
    """What replay cures for each precision of the sampler, with one spread of initial weights."""
    (spread,) = {m["spread"] for m in read()["mismatch"] if m["precision"] != "fp8"}
    return _mismatches("precision", [m for m in read()["mismatch"] if m["spread"] == spread], "sampler", str)


def spreads() -> str:
    """What replay cures of an fp8 sampler, for each spread of initial weights."""
    of_fp8 = sorted((m for m in read()["mismatch"] if m["precision"] == "fp8"), key=lambda m: float(m["spread"]))
    return _mismatches("spread", of_fp8, "std of initial weights", "{:g}".format)


def _mismatches(field: str, of: Sequence[Record], named: str, form: Callable[[Any], str]) -> str:
    rows = []
    for size in dict.fromkeys(m["size"] for m in read()["mismatch"]):
        for value in dict.fromkeys(m[field] for m in of):
            here = [m for m in of if (m["size"], m[field]) == (size, value)]
            falls = sorted(m["before"]["k3"] / m["after"]["k3"] for m in here)
            rows.append(
                [
                    size,
                    form(value),
                    *(
                        f"{_middle(here, 'before', name):{digits}} to {_middle(here, 'after', name):{digits}}"
                        for name, digits in (("differs", ".1%"), ("prob_diff", ".1e"), ("k3", ".1e"))
                    ),
                    f"{median(falls):.1f} ({falls[0]:.1f} to {falls[-1]:.1f})",
                    f"{sum(x >= 3 for x in falls)} of {len(falls)}",
                ]
            )
    head = ["mixture", named, "tokens whose experts differ", "mean abs(pi - mu)", "k3"]
    return markdown([*head, "k3 falls by a factor of", "at least 3"], rows)


def _middle(of: Sequence[Record], when: str, name: str) -> float:
    return float(median(m[when][name] for m in of))


# ---- runs ----


def runs() -> str:
    """Rewards of the runs, and their differences from the run of the same seed without replay."""
    rows = []
    for updates in dict.fromkeys(r["updates"] for r in read()["runs"]):
        here = [r for r in read()["runs"] if r["updates"] == updates]
        for replay in dict.fromkeys(r["replay"] for r in here):
            of = {r["seed"]: r for r in here if r["replay"] == replay}
            off = {r["seed"]: r for r in here if r["replay"] == "off"}
            rows.append(
                [
                    f"`{replay}`",
                    str(updates),
                    str(len(of)),
                    _mean(t_interval([[_end(r) for r in of.values()]])),
                    _mean(t_interval([[_whole(r, "reward_mean") for r in of.values()]])),
                    *("-" if replay == "off" else _difference(of, off, f) for f in (_end, _area)),
                    *(f"{fmean(_whole(r, name) for r in of.values()):.1e}" for name in ("prob_diff_mean", "k3")),
                    "-" if replay == "off" else f"{fmean(_whole(r, 'routing_replaced') for r in of.values()):.1%}",
                ]
            )
    head = ["`--routing-replay`", "updates", "seeds", "reward, last tenth", "reward, all steps"]
    against = ["last tenth, against `off`", "all steps, against `off`"]
    return markdown([*head, *against, "mean abs(pi - mu)", "k3", "replaced"], rows)


def _whole(run: Record, name: str) -> float:
    """The mean over the steps that have the figure."""
    return fmean(x for x in run["series"][name] if x is not None)


def _area(run: Record) -> float:
    return _whole(run, "reward_mean")


def _end(run: Record) -> float:
    rewards = run["series"]["reward_mean"]
    return fmean(rewards[-max(1, len(rewards) // 10) :])


def _difference(of: Mapping[int, Record], off: Mapping[int, Record], f: Callable[[Record], float]) -> str:
    mine, theirs = ({"runs": {seed: f(r) for seed, r in side.items()}} for side in (of, off))
    found = paired_difference(mine, theirs).t
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _mean(interval: Interval) -> str:
    low, high = max(0.0, interval.low), min(1.0, interval.high)
    return f"{interval.value:.3f} ({low:.3f} to {high:.3f})"


def draw_runs(path: Path) -> Path:
    """Draw reward and mismatch of the runs, a row for each number of updates: every seed thin, the mean thick."""
    all_updates = list(dict.fromkeys(r["updates"] for r in read()["runs"]))
    figure = Figure(figsize=(4.3 * len(SHOWN), 0.6 + 3.0 * len(all_updates)), layout="constrained")
    panels = figure.subplots(len(all_updates), len(SHOWN), squeeze=False, sharex=True)
    for row, updates in zip(panels, all_updates, strict=True):
        for axes, (name, label) in zip(row, SHOWN.items(), strict=True):
            _panel(axes, [r for r in read()["runs"] if r["updates"] == updates], name)
            axes.set_title(f"{label}, {updates} update{'s' if updates > 1 else ''} per rollout", fontsize=9)
            axes.set_yscale("linear" if name == "reward_mean" else "log")
            axes.grid(alpha=0.25)
        row[0].legend(fontsize=8, title="routing replay", title_fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.suptitle("a tiny mixture of experts with an fp8 sampler: mean over seeds (thick), every seed (thin)")
    save_figure(figure, path)
    return path


def _panel(axes: Axes, of: Sequence[Record], name: str) -> None:
    for i, replay in enumerate(("off", "sampler", "trainer")):
        curves = [[np.nan if x is None else x for x in r["series"][name]] for r in of if r["replay"] == replay]
        if curves:
            steps = range(1, 1 + len(curves[0]))
            for curve in curves:
                axes.plot(steps, curve, color=COLORS[i], linewidth=0.5, alpha=0.4)
            axes.plot(steps, np.ma.masked_invalid(curves).mean(axis=0), color=COLORS[i], linewidth=1.9, label=replay)


# ---- costs ----


def costs() -> str:
    """What reporting and replaying cost."""
    rows = [
        [
            c["size"],
            f"{c['bytes_per_token']:g}",
            *(
                f"{c[part][0]:.2f} s, {c[part][1]:.2f} s: {c[part][1] / c[part][0]:.2f}"
                for part in ("sampling", "update")
            ),
        ]
        for c in read()["costs"]
    ]
    head = ["mixture", "bytes of a token's choices", "sampling: without, with, ratio", "update: without, with, ratio"]
    return markdown(head, rows)
