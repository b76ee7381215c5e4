"""Tables and the figure of docs/regions.md, from the committed runs; `figures.py` puts them there."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations, pairwise, product
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from matplotlib.figure import Figure

import regions
import study_runs
from drpo.files import save_figure
from drpo.lab.claims import COLLAPSE, Decision
from drpo.lab.multiple import look_levels
from drpo.lab.power import detectable, equivalence_power
from drpo.lab.statistics import t_interval
from drpo.report.figures import COLORS
from markdown_tables import markdown
from regions import FIRST, MORE, STUDIES, Study

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")


@cache
def records(study: Study) -> list[study_runs.Record]:
    """Return the finished runs of a study."""
    return list(study_runs.read(study.records).values())


@cache
def decisions(study: Study) -> dict[str, list[Decision]]:
    """Return what every family of a study came to."""
    return regions.decisions(study, study_runs.read(study.records))


def shown(objective: str) -> str:
    """Return an objective as the page writes it."""
    return f"`{objective.rpartition(':')[2].lower()}`"


@cache
def trained(study: Study) -> list[str]:
    """Return the regimes whose first look is complete, in their order."""
    looked = {d.contrast.strata[0][0][0]: d.seeds for of in decisions(study).values() for d in of if d.seeds}
    return [name for name in study.regimes if name in looked]


def _of(study: Study, regime: str, objective: str) -> list[study_runs.Record]:
    return [r for r in records(study) if (r["regime"], r["objective"]) == (regime, objective)]


def objectives(study: Study) -> list[str]:
    """Return the objectives that have been run, as records write them."""
    run = {r["objective"] for r in records(study)}
    return [name for name in map(study_runs.spec_of, study.objectives) if name in run]


def ends(study: Study) -> str:
    """Mean final reward of every objective in every regime, in points, with Student's interval."""

    def cell(regime: str, objective: str) -> str:
        values = [100 * r["end"] for r in _of(study, regime, objective)]
        if len(values) < 2:
            return "-"
        of = t_interval([values])
        fell = sum(r["end"] <= r["start"] for r in _of(study, regime, objective))
        return f"{of.value:.1f} ± {of.high - of.value:.1f}" + (f", {fell} fell" if fell else "")

    rates = regions.rates(study)
    rows = [[shown(o), f"{rates[o]:g}", *(cell(r, o) for r in trained(study))] for o in objectives(study)]
    return markdown(["objective", "rate", *trained(study)], rows)


def family(study: Study, name: str) -> Callable[[], str]:
    """Return a table of the decisions of a family: a row for each pair, a column for each regime."""

    def table() -> str:
        of_family = [d for d in decisions(study)[name] if d.contrast.strata[0][0][0] in trained(study)]
        begun = {(d.contrast.of, d.contrast.against) for d in of_family if d.seeds}
        if not begun:
            return "No pair of these has been run yet."
        pairs = [
            pair for pair in dict.fromkeys((d.contrast.of, d.contrast.against) for d in of_family) if pair in begun
        ]
        by = {(d.contrast.of, d.contrast.against, d.contrast.strata[0][0][0]): d for d in of_family}
        endpoint = study_runs.plans(study.claims)[name].endpoint
        rows = [
            [f"{shown(a)} less {shown(b)}", *(_decided(by[a, b, r], endpoint) for r in trained(study))]
            for a, b in pairs
        ]
        return markdown(["points (95 %)", *trained(study)], rows)

    return table


def _decided(d: Decision, endpoint: str) -> str:
    if not d.seeds:
        return "-"
    verdict = study_runs.verdict(d)
    if endpoint == COLLAPSE:
        size = " and ".join(f"{round(of.value * of.n)} of {of.n}" for of in d.collapse)
    else:
        size = f"{100 * d.difference.value:+.1f} ({100 * d.difference.low:+.1f} to {100 * d.difference.high:+.1f})"
    return size if verdict == "undecided" else f"{size} **{verdict}**"


def spread(regime: str, a: str, b: str, of: list[study_runs.Record]) -> float | None:
    """Return the standard deviation of a seed's difference between two objectives; None without two seeds."""
    ends_of = {(r["objective"], r["seed"]): r["end"] for r in of if r["regime"] == regime}
    apart = [end - ends_of[b, seed] for (o, seed), end in ends_of.items() if o == a and (b, seed) in ends_of]
    return stdev(apart) if len(apart) > 1 else None


def power_of_spreads() -> str:
    """What question (a) and the baselines of the first study could decide in each regime, by the spread seen."""
    rows = []
    for regime in trained(FIRST):
        row = [regime]
        for name, a, b in (("a", "drpo(12.5)", "none"), ("baselines", "drpo(0.2)", "none")):
            plan, sd = study_runs.plans(FIRST.claims)[name], spread(regime, a, b, records(FIRST))
            n = len({r["seed"] for r in records(FIRST) if r["regime"] == regime and r["objective"] == a})
            if sd is None or n not in plan.seeds:
                row += ["-", "-", "-"]
                continue
            look = look_levels(plan.seeds, plan.error_rate)[plan.seeds.index(n)]
            level = look / len(decisions(FIRST)[name])
            least = detectable(n, level) or float("nan")
            chance = equivalence_power(n, level, (plan.margin or 0.03) / sd)
            row += [f"{100 * sd:.1f}", f"{100 * sd * least:.1f}", f"{chance:.0%}"]
        rows.append(row)
    head = ["regime", *(f"{q}: {what}" for q in ("(a)", "baselines") for what in ("spread", "decides", "equivalence"))]
    return markdown(head, rows)


FIGURES: Mapping[str, str] = {
    "mismatch": "{:.1e}",
    "k3": "{:.1e}",
    "prob_diff": "{:.3f}",
    "far": "{:.2%}",
    "mu": "{:.3f}",
    "entropy": "{:.2f}",
}
EARLY: Mapping[str, str] = {
    "mismatch": "k3 of the sampler alone",
    "k3": "k3",
    "prob_diff": "the mean of D",
    "far": "the share of D above 0.2",
    "mu": "the mean mu",
    "entropy": "the entropy",
}
"""What may predict a radius: means over the first quarter of a run without a region."""


def movement() -> str:
    """How far the policy was from its sampler without a region, by regime: means over seeds and steps."""
    rows = []
    for regime in trained(FIRST):
        here = _of(FIRST, regime, "none")
        means = {name: fmean(fmean(r[name]) for r in here) for name in FIGURES}
        row = [regime, *(form.format(means[name]) for name, form in FIGURES.items())]
        rows.append([*row, f"{fmean(r['entropy'][-1] for r in here):.2f}", f"{fmean(r['start'] for r in here):.2f}"])
    head = ["regime", "k3 of the sampler alone", "k3", "mean of D", "D above 0.2", "mean mu", "entropy"]
    return markdown([*head, "entropy at the end", "reward before"], rows)


def replay() -> str:
    """What it does that the trainer takes the sampler's experts; paired by seed, not registered."""
    without, replayed = "mixture, cold", "mixture, cold, replayed"
    rows = []
    for objective in objectives(MORE):
        plain, routed = ({r["seed"]: r for r in _of(MORE, regime, objective)} for regime in (without, replayed))
        both = sorted(plain.keys() & routed.keys())
        of = t_interval([[100 * (routed[s]["end"] - plain[s]["end"]) for s in both]])
        k3 = [f"{fmean(fmean(r['mismatch']) for r in runs.values()):.1e}" for runs in (plain, routed)]
        rows.append([shown(objective), str(len(both)), f"{of.value:+.1f} ({of.low:+.1f} to {of.high:+.1f})", *k3])
    head = ["objective", "seeds", "points by replay (95 %)", "k3 of the sampler alone", "the same, replayed"]
    return markdown(head, rows)


RADII = ("drpo(0.05)", "drpo(0.2)", "drpo(0.6)", "drpo(12.5)")
Choice = Callable[[str], str]
"""A radius for a regime."""


@cache
def _points(regime: str, objective: str) -> float:
    return 100 * fmean(r["end"] for r in _of(FIRST, regime, objective))


def radii() -> str:
    """Every radius less 0.6, in points, with Student's interval over seeds; not registered."""
    best = "drpo(0.6)"

    def cell(regime: str, objective: str) -> str:
        base = {r["seed"]: r["end"] for r in _of(FIRST, regime, best)}
        of = t_interval(
            [[100 * (r["end"] - base[r["seed"]]) for r in _of(FIRST, regime, objective) if r["seed"] in base]]
        )
        return f"{of.value:+.1f} ({of.low:+.1f} to {of.high:+.1f})"

    rows = [[f"{shown(o)} less {shown(best)}", *(cell(r, o) for r in trained(FIRST))] for o in RADII if o != best]
    return markdown(["points (95 %)", *trained(FIRST)], rows)


def _best(candidates: Sequence[Choice], regimes: Sequence[str]) -> Choice:
    return max(candidates, key=lambda choice: fmean(_points(r, choice(r)) for r in regimes))


def _fixed(radius: str) -> Choice:
    return lambda regime: radius


def _by(figure: Mapping[str, float], edge: float, below: str, above: str) -> Choice:
    return lambda regime: below if figure[regime] < edge else above


def prediction() -> str:
    """A radius by one early figure, fitted on half of the regimes, beside their best fixed radius, on the other half.

    The rule has one edge of the figure, halfway between two of the fitted regimes, and a radius on either side. It is
    an average over all ways to part the regimes.
    """
    rows = []
    halves = [
        (fit, [r for r in trained(FIRST) if r not in fit])
        for fit in combinations(trained(FIRST), len(trained(FIRST)) // 2)
    ]
    for name, title in EARLY.items():
        figure = {r: fmean(run[name][0] for run in _of(FIRST, r, "none")) for r in trained(FIRST)}
        gains = []
        for fit, rest in halves:
            edges = [(a + b) / 2 for a, b in pairwise(sorted(figure[r] for r in fit))]
            rule = _best([_by(figure, edge, *pair) for edge in edges for pair in product(RADII, RADII)], fit)
            fixed = _best([_fixed(radius) for radius in RADII], fit)
            gains.append([_points(r, rule(r)) - _points(r, fixed(r)) for r in rest])
        worse = fmean(gain < -3 for of_half in gains for gain in of_half)
        rows.append([title, f"{fmean(map(fmean, gains)):+.1f}", f"{worse:.0%}", f"{min(map(min, gains)):+.1f}"])
    head = ["the radius follows", "points over the best fixed radius", "regimes more than 3 points below it", "worst"]
    return markdown(head, rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "regions ends": lambda: ends(FIRST),
    "regions power": power_of_spreads,
    "regions movement": movement,
    "regions radii": radii,
    "regions prediction": prediction,
    **{f"regions {name}": family(FIRST, name) for name in ("a", "b", "c", "e", "f", "baselines", "collapse")},
    "regions_more ends": lambda: ends(MORE),
    "regions_more replay": replay,
    **{f"regions_more {name}": family(MORE, name) for name in ("baselines", "mask", "collapse")},
}


def verdicts_file(study: Study) -> Path:
    """Return the file of a study's verdicts."""
    return regions.RESULTS / f"{study.name}_verdicts.json"


def verdicts(study: Study) -> str:
    """Return the verdict of every comparison as JSON, a line for each: what `regions_check.py` checks."""
    parts = []
    for name, of_family in decisions(study).items():
        lines = [
            json.dumps(
                {
                    "regime": d.contrast.strata[0][0][0],
                    "of": d.contrast.of,
                    "against": d.contrast.against,
                    "seeds": d.seeds,
                    "verdict": study_runs.verdict(d),
                }
            )
            for d in of_family
        ]
        parts.append(f' "{name}": [\n  ' + ",\n  ".join(lines) + "\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_verdicts() -> None:
    """Write the verdicts of every study beside its runs."""
    for study in STUDIES.values():
        verdicts_file(study).write_text(verdicts(study), encoding="utf-8")


def draw(study: Study, path: Path) -> None:
    """Draw where each objective ends in every regime: seeds, mean and interval; the line is no region's mean."""
    regimes, names = trained(study), objectives(study)[::-1]
    columns = min(4, len(regimes))
    rows = -(-len(regimes) // columns)
    figure = Figure(figsize=(1.8 + 3.1 * columns, 0.8 + rows * (0.6 + 0.24 * len(names))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, regime in zip(panels, regimes, strict=False):
        for y, objective in enumerate(names):
            values = [r["end"] for r in _of(study, regime, objective)]
            if len(values) < 2:
                continue
            of = t_interval([values])
            axes.plot(values, [y] * len(values), "o", color=COLORS[1], alpha=0.5, markersize=3)
            axes.plot([of.low, of.high], [y, y], color=COLORS[0], linewidth=2)
            axes.plot([of.value], [y], "|", color=COLORS[0], markersize=10, markeredgewidth=2)
            if objective == "none":
                axes.axvline(of.value, color="gray", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), [shown(o).strip("`") for o in names], fontsize=8)
        axes.set_title(regime, fontsize=9)
        axes.grid(axis="x", alpha=0.25)
    for axes in panels[len(regimes) :]:
        axes.set_axis_off()
    figure.suptitle("final reward: seeds (dots), mean, Student's 95 % interval; dotted: no region", fontsize=10)
    save_figure(figure, path)
