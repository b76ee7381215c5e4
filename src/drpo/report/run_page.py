"""The report of one run: report.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo.objectives import REGISTRY, caution
from drpo.report.browser import columns, table, vocabulary
from drpo.report.distribution import histogram_plot, scatter_plots
from drpo.report.html import REPORT, Page, write
from drpo.report.panels import drawn_lines, numbers, panel_plot
from drpo.report.payload import columns_bytes, json_bytes
from drpo.report.run_summary import configuration, held_out, run_summary, shares, timeline, timeline_plot
from drpo.report.token_statistics import Rollouts, read_rollouts
from drpo.report.vocabulary import find_tokenizer, pieces
from drpo.spec import format_spec
from drpo.train.config import Run
from drpo.train.records import ENVIRONMENT, EVALUATIONS, METRICS, TIMING, read_json, read_records

MOST_TOKENS = 1_500_000
"""More would make a page that is slow to open; of a larger run a share of the groups is shown."""
SCRIPTS = ("rollouts.js", "rollout_list.js", "rollout_view.js", "keys.js")


def write_report(folder: Path, run: Run, out: Path | None = None) -> Path:
    """Write the report of a run; return its path.

    Args:
        folder: of the run, finished or not.
        run: its configuration.
        out: the file; None for report.html in the folder.
    """
    return write(run_page(folder, run), out or folder / REPORT)


def run_page(folder: Path, run: Run) -> Page:
    """Return the page of a run.

    Args:
        folder: of the run, finished or not.
        run: its configuration.
    """
    rollouts = read_rollouts(folder, run.objective.loss, MOST_TOKENS)
    metrics, evaluations = read_records(folder / METRICS), read_records(folder / EVALUATIONS)
    lines = drawn_lines(run, metrics, evaluations)
    steps, phases = timeline(read_records(folder / TIMING))
    plots = {
        "panels": [panel_plot(i, *drawn) for i, drawn in enumerate(lines)],
        "scatter": scatter_plots(rollouts, run.objective.loss, run.seed),
        "histogram": [plot for plot in [histogram_plot(rollouts)] if plot is not None],
        "timeline": [plot for plot in [timeline_plot(steps, phases)] if plot is not None],
    }
    values = {
        "title": f"{run.name}: {format_spec(run.objective.loss, REGISTRY)}, seed {run.seed}",
        "caution": caution(run.objective.loss),
        "summary": run_summary(run, _environment(folder), metrics),
        "held_out": held_out(evaluations),
        "numbers": [row for panel, of_panel, _ in lines for row in numbers(panel, of_panel)],
        "shares": shares(phases),
        "configuration": configuration(run),
        **plots,
    }
    drawn = [plot for of_section in plots.values() for plot in of_section]
    return Page("run.html", values, drawn, SCRIPTS, browser_payloads(folder, run, rollouts))


def browser_payloads(folder: Path, run: Run, rollouts: Rollouts) -> dict[str, bytes]:
    """Return the completions of a run, as the page's browser of them reads them."""
    tokenizer = find_tokenizer(folder, run)
    ids = vocabulary(rollouts)
    known = None if tokenizer is None else pieces(tokenizer, ids.tolist())
    return {
        "rollouts": json_bytes(table(rollouts, ids, known)),
        "tokens": columns_bytes(columns(rollouts, ids)),
    }


def _environment(folder: Path) -> Mapping[str, Any]:
    path = folder / ENVIRONMENT
    return read_json(path) if path.exists() else {}
