"""The report of one run: report.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo.objectives import caution, spell
from drpo.report.browser import columns, table, vocabulary
from drpo.report.distribution import histogram_data, region_data, scatter_data
from drpo.report.facts import accuracies, configuration, header_facts, timeline
from drpo.report.html import REPORT, Page, write
from drpo.report.panels import plain, run_panels
from drpo.report.payload import columns_bytes, json_bytes
from drpo.report.seen import Rollouts, read_rollouts
from drpo.report.vocabulary import find_tokenizer, pieces
from drpo.train.config import Run
from drpo.train.log import EVALUATIONS, METRICS, TIMING, read_json, read_records
from drpo.train.session import ENVIRONMENT

MOST_TOKENS = 1_500_000
"""More would make a page that is slow to open; of a larger run a share of the groups is shown."""
STYLES = ("run.css",)
SCRIPTS = ("run_plots.js", "rollouts.js", "rollout_list.js", "rollout_view.js", "run.js")


def write_report(folder: Path, run: Run, out: Path | None = None) -> Path:
    """Write the report of a run; return its path.

    Args:
        folder: of the run, finished or not.
        run: its configuration.
        out: the file; None for report.html in the folder.
    """
    rollouts = read_rollouts(folder, run.objective, MOST_TOKENS)
    tokenizer = find_tokenizer(folder, run)
    ids = vocabulary(rollouts)
    known = None if tokenizer is None else pieces(tokenizer, ids.tolist())
    page = Page(
        title=f"{run.name}: {spell(run.objective)}, seed {run.seed}",
        body="run.html",
        styles=STYLES,
        scripts=SCRIPTS,
        payloads={
            "run": json_bytes(run_data(folder, run, rollouts)),
            "rollouts": json_bytes(table(rollouts, ids, known)),
            "tokens": columns_bytes(columns(rollouts, ids)),
        },
    )
    return write(page, out or folder / REPORT)


def run_data(folder: Path, run: Run, rollouts: Rollouts) -> dict[str, Any]:
    """Return what the page says of a run, but for its completions.

    Args:
        folder: of the run.
        run: its configuration.
        rollouts: its completions.
    """
    metrics, evaluations = read_records(folder / METRICS), read_records(folder / EVALUATIONS)
    return {
        "name": run.name,
        "facts": header_facts(run, _environment(folder), metrics),
        "accuracy": accuracies(evaluations),
        "caution": caution(run.objective),
        "panels": [plain(panel) for panel in run_panels(run, metrics, evaluations)],
        "recorded": rollouts.recorded,
        "scatter": scatter_data(rollouts, run.seed),
        "regions": region_data(run.objective),
        "histogram": histogram_data(rollouts),
        "timeline": timeline(read_records(folder / TIMING)),
        "configuration": configuration(run),
    }


def _environment(folder: Path) -> Mapping[str, Any]:
    path = folder / ENVIRONMENT
    return read_json(path) if path.exists() else {}
