"""Figures and tables of pages of docs (`DOCUMENTS`), from the results beside this file.

`python studies/figures.py` draws the figures into docs/figures/ and puts the tables into the documents, each between
`<!-- table NAME -->` and `<!-- end -->`. A test checks that the documents are current.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, median

import agents
import claim_rates
import confirmation
import curriculum
import newcomer
import objectives_2026
import regions
import regions_page
import routing_replay_figures as replay
import warm_start
from comparison_figures import draw_curves, draw_finals
from drpo.lab.analysis import Condition, conditions, final, has_collapsed, label
from drpo.lab.claims import EACH, Decision, decide, read_plan
from drpo.lab.statistics import Interval, paired_difference, rate, stratified_interval, t_interval
from drpo.lab.trial_result import Comparison, Trial, load_results
from drpo.report.comparison_table import bounds
from drpo.train.records import read_json
from markdown_tables import markdown
from stability_maps import draw_maps
from tail_language import KINDS, task_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES = ROOT / "studies" / "results", ROOT / "docs" / "figures"
PAGES = ("objectives/index", "study", "regions", "stability", "agents", "precision", "methods", "statistics", "sft")
DOCUMENTS = tuple(ROOT / "docs" / f"{name}.md" for name in PAGES)


@cache
def read(name: str) -> Comparison:
    """Read one of the committed comparisons."""
    return replace(load_results(RESULTS / f"{name}.json"), name=name)


@cache
def results(name: str) -> list[Condition]:
    """Return the conditions of one of them; their intervals take a second."""
    return conditions(read(name))


def percent(interval: Interval) -> str:
    """Format a mean accuracy with its bounds, clipped to [0, 1]."""
    low, high = max(0.0, interval.low), min(1.0, interval.high)
    return f"{interval.value:.1%} ({low:.0%} to {high:.0%})"


def _fallen(c: Condition) -> str:
    return f"{round(c.collapse.value * c.collapse.n)} of {c.collapse.n}"


def ends(comparison: Comparison) -> str:
    """Final scores of every objective in every regime, per seed."""
    fields = comparison.regime_fields
    rows = [
        [
            *([label(c.regime, fields)] if fields else []),
            f"`{c.objective}`",
            percent(c.mean),
            ", ".join(f"{c.final[s]:.0%}" for s in sorted(c.final)),
            f"{c.area.value:.3f}",
            _fallen(c),
        ]
        for c in conditions(comparison)
    ]
    head = ["objective", "held-out accuracy, mean (95 % t)", "seeds", "mean training reward", "collapsed"]
    return markdown([*(["regime"] if fields else []), *head], rows)


def claimed(name: str, comparison: Comparison) -> str:
    """What a study's claims file names, and what every comparison of it came to."""
    plan = read_plan(RESULTS / f"{name}.claims.toml")
    fields = comparison.regime_fields if plan.regimes == EACH else ()

    def row(d: Decision) -> list[str]:
        size, p = d.difference, f"{d.adjusted:.2g}"
        fallen = " and ".join(f"{round(r.value * r.n)} of {r.n}" for r in d.collapse)
        apart = "-" if size.n == 0 else f"{size.value:+.2f} ({bounds(size)})"
        return [
            *([label(d.contrast.strata[0][0], fields)] if fields else []),
            f"`{d.contrast.of}` less `{d.contrast.against}`",
            *(apart, str(size.n), p, fallen),
            ("above" if size.value > 0 else "below") if d.differs else "undecided",
        ]

    head = ["comparison", "difference (95 %)", "seeds", "adjusted p", "collapsed", "decided"]
    return markdown([*(["regime"] if fields else []), *head], list(map(row, decide(plan, comparison))))


def _ablations() -> Comparison:
    """The ablations beside the six objectives in the same regime."""
    own, stale = read("ablations"), [c for c in read("addition").trials if c.config["updates"] == 8]
    return replace(own, trials=(*own.trials, *stale))


def pooled(parts: Mapping[str, Comparison]) -> str:
    """Pooled final scores of the objectives in all regimes, regimes as strata, and paired differences to the first."""
    strata = {
        (name, regime): {o: {c.seed: final(c) for c in trials if c.objective == o and c.over} for o in part.objectives}
        for name, part in parts.items()
        for regime, trials in part.by_regime()
    }
    common = [o for o in next(iter(strata.values())) if all(values.get(o) for values in strata.values())]
    everything = [c for part in parts.values() for c in part.trials if c.over]

    def row(objective: str) -> list[str]:
        values = [list(of[objective].values()) for of in strata.values()]
        mine, first = ({str(k): of[o] for k, of in strata.items()} for o in (objective, common[0]))
        apart = paired_difference(mine, first).t
        fallen = rate([has_collapsed(c) for c in everything if c.objective == objective])
        iqm = stratified_interval(values)
        return [
            f"`{objective}`",
            str(iqm.n),
            percent(iqm),
            percent(t_interval(values)),
            "-" if objective == common[0] else f"{apart.value:+.3f} ({apart.low:+.2f} to {apart.high:+.2f})",
            f"{round(fallen.value * fallen.n)} of {fallen.n}",
        ]

    head = [
        "objective",
        "runs",
        "iqm (stratified bootstrap)",
        "mean (t)",
        f"against `{common[0]}`, paired",
        "collapsed",
    ]
    return markdown(head, [row(o) for o in common])


def region(comparison: Comparison) -> str:
    """The policy's distance from the sampler, per regime and objective: means over steps and seeds."""
    fields = comparison.regime_fields

    def mean(trials: Sequence[Trial], name: str, form: str) -> str:
        values = [x for c in trials for x in c.series[name] if x is not None]
        return form.format(sum(values) / len(values)) if values else "-"

    columns = {
        "prob_diff_mean": "{:.4f}",
        "prob_diff_p99": "{:.3f}",
        "out_of_region": "{:.2%}",
        "masked": "{:.2%}",
        "k3": "{:.4f}",
    }
    rows = []
    for regime, trials in comparison.by_regime():
        for objective in comparison.objectives:
            here = [c for c in trials if c.objective == objective]
            shown = [mean(here, name, form) for name, form in columns.items()]
            rows.append([*([label(regime, fields)] if fields else []), f"`{objective}`", *shown])
    head = [*(["regime"] if fields else []), "objective", "mean of D", "p99 of D", "out of region", "masked", "k3"]
    return markdown(head, rows)


def stability_table(name: str) -> str:
    """Final scores of each objective, per task, updates per rollout and learning rate."""
    comparison, found = read(name), results(name)
    fields = comparison.regime_fields
    rates = sorted({c.learning_rate for c in found})
    rows = []
    for task, updates in dict.fromkeys(_where(c, fields) for c in found):
        here = [c for c in found if _where(c, fields) == (task, updates)]
        for objective in comparison.objectives:
            mine = [[c for c in here if (c.objective, c.learning_rate) == (objective, rate)] for rate in rates]
            rows.append([task, str(updates), f"`{objective}`", *map(_mean_end, mine)])
    return markdown(["the tail is", "updates", "objective", *[f"{rate:g}" for rate in rates]], rows)


def _mean_end(of_cell: Sequence[Condition]) -> str:
    """Mean final score over all seeds and samplers, and the number of runs that fell."""
    fallen = sum(round(c.collapse.value * c.collapse.n) for c in of_cell)
    ended = t_interval([list(c.final.values()) for c in of_cell])
    return f"{ended.value:.2f} ({ended.low:.2f} to {ended.high:.2f})" + (
        f", {fallen} of {ended.n} fell" if fallen else ""
    )


@cache
def _pooled_ends(name: str) -> dict[tuple[int, float], dict[str, Interval]]:
    """(updates, learning rate) -> objective -> mean final score; the strata are the tasks and samplers."""
    fields = read(name).regime_fields
    parts: dict[tuple[int, float], dict[str, list[list[float]]]] = {}
    for c in results(name):
        here = parts.setdefault((_where(c, fields)[1], c.learning_rate), {})
        here.setdefault(c.objective, []).append(list(c.final.values()))
    return {where: {o: t_interval(strata) for o, strata in of.items()} for where, of in sorted(parts.items())}


def stability_pooled(name: str) -> str:
    """Final scores of each objective by updates and learning rate, pooled over both tasks and all samplers."""
    pools = _pooled_ends(name)
    rows = [
        [f"`{o}`", *(f"{of[o].value:.2f} ({of[o].low:.2f} to {of[o].high:.2f})" for of in pools.values())]
        for o in read(name).objectives
    ]
    return markdown(["objective", *(f"{updates} updates, {lr:g}" for updates, lr in pools)], rows)


RADII = (
    *("drpo(0.02)", "drpo(0.05)", "drpo(0.2)", "drpo(0.6)", "drpo(12.5)"),
    *("drpo(0.3, 0.5)", "spo(0.5)", "spo(3)", "ppo(0.2, 0.28)", "none"),
)


def radii(main: Comparison, others: Comparison) -> str:
    """Final scores by radius with 16 updates and a sampler in fp32, both tasks together."""
    rates = sorted({c.learning_rate for c in main.trials})
    trials = [
        c
        for c in (*main.trials, *others.trials)
        if (c.config["updates"], c.config["rollout_precision"]) == (16, "fp32") and c.over
    ]

    def end(objective: str, learning_rate: float) -> str:
        here = [c for c in trials if (c.objective, c.learning_rate) == (objective, learning_rate)]
        strata = [[final(c) for c in here if c.config["task"] == task] for task in {c.config["task"] for c in here}]
        interval, fallen = t_interval(strata), sum(map(has_collapsed, here))
        return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})" + (
            f", {fallen} fell" if fallen else ""
        )

    return markdown(["objective", *(f"{r:g}" for r in rates)], [[f"`{o}`", *(end(o, r) for r in rates)] for o in RADII])


MOVEMENT = {"prob_diff_p99": "{:.3f}", "ratio_max": "{:.3g}", "k3": "{:.4f}", "entropy": "{:.2f}"}


def stability_movement(comparison: Comparison) -> str:
    """The policy's distance from the sampler at the middle learning rate: medians of the runs' means over steps."""
    rates = sorted({c.learning_rate for c in comparison.trials})
    middle = [c for c in comparison.trials if c.learning_rate == rates[len(rates) // 2]]
    rows = []
    for updates in sorted({int(c.config["updates"]) for c in middle}):
        for objective in comparison.objectives:
            here = [c.series for c in middle if (c.objective, c.config["updates"]) == (objective, updates)]
            typical = {k: median(fmean(x for x in series[k] if x is not None) for series in here) for k in MOVEMENT}
            rows.append([str(updates), f"`{objective}`", *(MOVEMENT[k].format(x) for k, x in typical.items())])
    return markdown(["updates", "objective", "p99 of D", "largest r", "k3, nats", "entropy, nats"], rows)


def _where(c: Condition, fields: Sequence[str]) -> tuple[str, int]:
    task = str(c.regime[fields.index("task")])
    return ("noise" if "noise" in task else "meaning"), int(c.regime[fields.index("updates")])


TABLES: Mapping[str, Callable[[], str]] = {
    "addition": lambda: ends(read("addition")),
    "addition claims": lambda: claimed("addition", read("addition")),
    "chain_sum": lambda: ends(read("chain_sum")),
    "chain_sum claims": lambda: claimed("chain_sum", read("chain_sum")),
    "ablations claims": lambda: claimed("ablations", _ablations()),
    "ablations": lambda: ends(read("ablations")),
    "region": lambda: region(read("addition")),
    "pooled": lambda: pooled({name: read(name) for name in ("addition", "chain_sum")}),
    "stability": lambda: stability_table("stability"),
    "stability pooled": lambda: stability_pooled("stability"),
    "stability claims": lambda: claimed("stability", read("stability")),
    "sixteen updates claims": lambda: claimed("sixteen_updates", read("sixteen_updates")),
    "radii": lambda: radii(read("stability"), read("radii")),
    "agents": lambda: markdown(
        ["recipe", "seed", "before", "after", "time of the command"], agents.table_rows(agents.read_results())
    ),
    "curriculum": lambda: curriculum.table(read_json(curriculum.RESULTS)),
    "newcomer": lambda: newcomer.table(read_json(newcomer.RESULTS)),
    "warm start": lambda: warm_start.table(read_json(warm_start.RESULTS)),
    "stability movement": lambda: stability_movement(read("stability")),
    "false claims": lambda: claim_rates.table("false", claim_rates.WITHIN),
    "false claims over regimes": lambda: claim_rates.table("false", claim_rates.OVER),
    "power": lambda: claim_rates.table("power", claim_rates.WITHIN, ("half differ",)),
    "power over regimes": lambda: claim_rates.table("power", claim_rates.OVER, ("half differ",)),
    "coverage": lambda: claim_rates.table("coverage", claim_rates.WITHIN),
    "coverage over regimes": lambda: claim_rates.table("coverage", claim_rates.OVER),
    "seeds of looks": claim_rates.seeds_table,
    "equivalence": claim_rates.equivalence_table,
    "collapse rates": claim_rates.collapse_table,
    "replay by precision": replay.precisions,
    "replay by initial weights": replay.spreads,
    "replay in runs": replay.runs,
    "replay costs": replay.costs,
    "confirmation": confirmation.table,
    "objectives of 2026": lambda: objectives_2026.table(objectives_2026.read_results()),
    **regions_page.TABLES,
}


def filled(text: str) -> str:
    """Return a document with its tables updated."""
    return re.sub(
        r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text, flags=re.DOTALL
    )


def draw() -> None:
    """Draw every figure."""
    for name in ("addition", "chain_sum", "ablations"):
        draw_curves(read(name), FIGURES / f"study_{name}_curves.png")
        draw_finals(read(name), FIGURES / f"study_{name}_ends.png")
    for kind in KINDS:
        draw_maps(read("stability"), task_of(kind), f"the tail is {kind}", FIGURES / f"stability_{kind}.png")
    agents.draw(agents.read_results())
    replay.draw_runs(FIGURES / "routing_replay.png")
    regions_page.draw(regions.FIRST, FIGURES / "regions.png")
    regions_page.draw(regions.MORE, FIGURES / "regions_more.png")


if __name__ == "__main__":
    regions_page.write_verdicts()
    draw()
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
