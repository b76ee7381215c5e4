"""The runs of docs/agents.md: what they learnt, how long they took, and their curves.

    drpo train calculator --seed 0 --out runs/calculator-0
    python studies/agents.py runs/calculator-0 runs/calculator-1 --seconds 218 212

adds runs to results/agents.json, in place of those of the same recipe and seed, and draws docs/figures/agents.png; then
`python studies/figures.py` puts the table into the page.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from command import run
from drpo.files import save_figure
from drpo.report.figures import COLORS
from drpo.train.records import CONFIG, ENVIRONMENT, METRICS, SUMMARY, read_json, read_records

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURE = ROOT / "studies" / "results" / "agents.json", ROOT / "docs" / "figures" / "agents.png"
_SCORES = ("reward_mean", "low", "high")


def record(folder: Path, seconds: int) -> dict[str, Any]:
    """Return what is kept of a finished run.

    Args:
        folder: of the run.
        seconds: wall-clock time of its command, from start to end.
    """
    config, summary, machine = (read_json(folder / name) for name in (CONFIG, SUMMARY, ENVIRONMENT))
    steps = read_records(folder / METRICS)
    return {
        "recipe": config["name"],
        "seed": config["seed"],
        "steps": len(steps),
        "problems": summary["evaluation_after"]["n_problems"],
        "before": [summary["evaluation_before"][name] for name in _SCORES],
        "after": [summary["evaluation_after"][name] for name in _SCORES],
        "seconds": seconds,
        "processor": machine["processor"],
        "cores": machine["cores"],
        **{name: [step[name] for step in steps] for name in ("reward_mean", "turns")},
    }


def read_results() -> list[dict[str, Any]]:
    """Return the committed runs, by recipe and seed."""
    return list(read_json(RESULTS)["runs"]) if RESULTS.exists() else []


def table_rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the page's table: recipe, seed, held-out success before and after with interval, time."""
    rows = []
    for of_recipe in _by_recipe(runs):
        for i, one in enumerate(of_recipe):
            value, low, high = one["after"]
            name = f"`{one['recipe']}`, {one['steps']} steps" if i == 0 else ""
            after = f"{value:.0%} ({low:.0%} to {high:.0%})"
            rows.append([name, str(one["seed"]), f"{one['before'][0]:.0%}", after, f"{one['seconds']} s"])
    return rows


def _by_recipe(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    return [list(of_one) for _, of_one in groupby(runs, key=lambda one: one["recipe"])]


def draw(runs: Sequence[Mapping[str, Any]]) -> None:
    """Draw the share of training episodes that succeed, step by step, and the held-out ones before and after."""
    matplotlib.use("Agg")
    recipes = _by_recipe(runs)
    figure = Figure(figsize=(4.2 * len(recipes), 3.4), layout="constrained")
    panels = figure.subplots(1, len(recipes), squeeze=False, sharey=True)[0]
    for axes, of_recipe in zip(panels, recipes, strict=True):
        for one, color in zip(of_recipe, COLORS, strict=False):
            steps = range(1, one["steps"] + 1)
            axes.plot(steps, one["reward_mean"], color=color, label=f"seed {one['seed']}")
            axes.plot([0, one["steps"]], [one["before"][0], one["after"][0]], "o", color=color, markersize=5)
        axes.set(title=of_recipe[0]["recipe"], xlabel="step", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("episodes that succeed")
    figure.suptitle("in training (lines), held out before and after (dots)", fontsize=10)
    save_figure(figure, FIGURE)


def main(arguments: Sequence[str]) -> int:
    """Add runs to the results and draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--seconds", type=int, nargs="*", default=[], help="wall-clock time of each run's command")
    options = parser.parse_args(arguments)
    if len(options.runs) != len(options.seconds):
        parser.error(f"--seconds: {len(options.seconds)} numbers for {len(options.runs)} runs")
    new = [record(folder, seconds) for folder, seconds in zip(options.runs, options.seconds, strict=True)]
    kept = {(one["recipe"], one["seed"]): one for one in [*read_results(), *new]}
    runs = [kept[key] for key in sorted(kept)]
    RESULTS.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    draw(runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
