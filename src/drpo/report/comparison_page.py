"""The report of a comparison: report.html."""

import os
from pathlib import Path
from urllib.parse import quote

from drpo.lab.trial_result import Comparison, Trial
from drpo.report.comparison_data import (
    cautions,
    comparison_summary,
    counts,
    differences_table,
    ends_table,
    seeds_sentence,
    trials_table,
)
from drpo.report.comparison_plots import comparison_plots, view_of
from drpo.report.comparison_table import claim_lines
from drpo.report.html import REPORT, Page, write
from drpo.train.records import TRIALS


def write_comparison_report(folder: Path, comparison: Comparison, out: Path | None = None) -> Path:
    """Write the report of a comparison; return its path.

    Args:
        folder: of the comparison, finished or not.
        comparison: what was read from it.
        out: the file; None for report.html in the folder.
    """
    path = out or folder / REPORT
    return write(comparison_page(folder, comparison, path.parent), path)


def comparison_page(folder: Path, comparison: Comparison, start: Path) -> Page:
    """Return the page of a comparison.

    Args:
        folder: of the comparison, finished or not.
        comparison: what was read from it.
        start: folder that the page will be in.
    """
    view = view_of(comparison)
    plots = comparison_plots(view)
    of_regime = {
        name: [[c for c in found if c.regime == regime] for found in (view.found, view.chosen)]
        for regime, name in view.regimes.items()
    }
    values = {
        "title": f"{comparison.name}: {len(comparison.objectives)} objectives compared",
        "caution": " ".join(cautions(comparison.objectives)),
        "summary": comparison_summary(comparison),
        "counts": counts(comparison),
        "claims": list(claim_lines(view.found, comparison.regime_fields)),
        "seeds": seeds_sentence(min((c.mean.n for c in view.chosen), default=0)),
        "rates": sorted({c.learning_rate for c in view.found}),
        "ends_tables": {name: ends_table(*found) for name, found in of_regime.items()},
        "differences_tables": {name: differences_table(chosen) for name, (_, chosen) in of_regime.items()},
        "trials": trials_table(comparison),
        "links": [trial_page(folder, trial, start) for trial in comparison.trials],
        **plots,
    }
    return Page("comparison.html", values, [plot for of_section in plots.values() for plot in of_section])


def trial_page(folder: Path, trial: Trial, start: Path) -> tuple[str, str]:
    """Return where a trial's own report is, from `start`; where there is none, "" and the command that writes it.

    Args:
        folder: of the comparison; the command is one to give in it.
        trial: one of its trials. Where its folder is gone both are "".
        start: folder of the page that links to it.
    """
    own = folder / TRIALS / trial.name
    if (own / REPORT).is_file():
        return quote(Path(os.path.relpath(own / REPORT, start)).as_posix()), ""
    return "", f"drpo report {TRIALS}/{trial.name}" if own.is_dir() else ""
