"""The report of a comparison: report.html."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from drpo.errors import as_typed
from drpo.lab.claims import plan_of
from drpo.lab.trial_result import Comparison, Trial
from drpo.report.comparison_data import (
    cautions,
    comparison_summary,
    counts,
    differences_table,
    ends_table,
    seeds_sentence,
    trials_tables,
)
from drpo.report.comparison_plots import View, comparison_plots, view_of
from drpo.report.comparison_table import claim_lines
from drpo.report.figures import Plot
from drpo.report.html import REPORT, Page, Section, write
from drpo.terminal import Sheet
from drpo.train.records import TRIALS

MOST_CLAIMS = 4
"""Of those that are said at the top."""
REWARD = (
    "Mean over seeds, each objective at its best learning rate; the band goes from the lowest seed to the highest. "
    "Steps that a diverged run did not live to see count 0. A name in the legend switches an objective off and on. Of "
    "long curves the least and the greatest of every few steps are drawn."
)
ENDS = (
    "Held-out mean reward at the end; without evaluations, the mean training reward of the last quarter of steps. A "
    "run that diverged leaves no policy and counts 0. Dots are seeds, the bar is their mean, the line Student's 95 % "
    "interval, cut in the plot at what a reward can be. Each objective is drawn at its best learning rate, chosen on "
    "these same seeds."
)
DIFFERENCES = (
    "Runs of one seed share their problems and the order of them. The line is Student's 95 % interval of the mean "
    "difference from the first objective, each at its best learning rate; the tables have every pair, which describes "
    "these runs. Claimed is only what claims.toml named in advance, by its tests."
)
CLAIMS = (
    "A line is a comparison that claims.toml named in advance, and what its test came to; what is decided comes first."
)
SWEEP = (
    "Where each ends at every learning rate that it was tried at, with Student's 95 % interval as a band. An "
    "objective whose best lies at an end of its line may do better beyond it."
)
UNTUNED = "no objective was tuned, which may suit one better than another."
METRICS = (
    "The mean over seeds, each objective at its best learning rate; the band goes from the lowest seed to the highest."
)
TRIALS_TEXT = (
    "A trial's own report shows every token; where it is not written yet, the command writes it, given in the "
    "comparison's folder."
)


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
    plots, came_to = comparison_plots(view), counts(comparison)
    nothing = "one objective alone: nothing to compare" if view.chosen else "no trial has come to its end yet"
    claims = (list(claim_lines(plan_of(folder), comparison)) if view.chosen else []) or [nothing]
    total = len(comparison.trials) + came_to["missing"]
    return Page(
        kind="comparison",
        title=f"{comparison.name}: {len(comparison.objectives)} objectives compared",
        caution=" ".join(cautions(comparison.objectives)),
        result=("Trials with a result", f"{came_to['finished'] + came_to['diverged']} of {total}"),
        lines=[", ".join(f"{n} {name}" for name, n in came_to.items()), *(f"{line}." for line in claims[:MOST_CLAIMS])],
        summary=comparison_summary(comparison),
        sections=[
            Section("reward", "Reward", "Training reward", REWARD, plots["reward"]),
            *result_sections(view, plots, claims),
            Section("metrics", "Trust region", "Trust region", METRICS, plots["metrics"]),
            trials_section(folder, comparison, start),
        ],
    )


def result_sections(view: View, plots: Mapping[str, Sequence[Plot]], claims: Sequence[str]) -> list[Section]:
    """Return where each objective ends, by how much they differ, and at which learning rates."""
    regimes = [(name or "All trials", regime) for regime, name in view.regimes.items()]
    found, chosen = ([[c for c in part if c.regime == r] for _, r in regimes] for part in (view.found, view.chosen))
    ends = [ends_table(name, *parts) for (name, _), *parts in zip(regimes, found, chosen, strict=True)]
    pairs = [differences_table(name, part) for (name, _), part in zip(regimes, chosen, strict=True)]
    rates = sorted({c.learning_rate for c in view.found})
    one_rate = f"All trials have the learning rate {rates[0] if rates else 'none'}: " + UNTUNED
    said = Sheet("", ("What may be claimed",), tuple((line,) for line in claims), CLAIMS)
    differences = f"{DIFFERENCES} {seeds_sentence(min((c.mean.n for c in view.chosen), default=0))}"
    return [
        Section("ends", "Ends", "Where each ends", ENDS, plots["ends"], ends),
        Section(
            "differences",
            "Differences",
            "Differences, seed by seed",
            differences,
            plots["differences"],
            pairs if plots["differences"] else [],
            [said],
        ),
        Section("sweep", "Learning rates", "Learning rates", SWEEP if plots["sweep"] else one_rate, plots["sweep"]),
    ]


def trials_section(folder: Path, comparison: Comparison, start: Path) -> Section:
    """Return every trial, with the way to its own report."""
    texts = trials_tables(comparison, [trial_page(folder, trial, start) for trial in comparison.trials])
    text = f"{len(comparison.trials)} runs, and what they differ by. {TRIALS_TEXT}"
    return Section("trials", "Trials", "Trials", text, texts=texts)


def trial_page(folder: Path, trial: Trial, start: Path) -> str:
    """Return a link to a trial's own report; where there is none, the command that writes it.

    Args:
        folder: of the comparison; the command is one to give in it.
        trial: one of its trials. Where its folder is gone there is neither.
        start: folder of the page that links to it.
    """
    own = folder / TRIALS / trial.name
    if (own / REPORT).is_file():
        link = quote(Path(os.path.relpath(own / REPORT, start)).as_posix())
        return Markup('<a href="{}">open</a>').format(link)
    report = f"drpo report {as_typed(f'{TRIALS}/{trial.name}')}"
    return Markup("<code>{}</code>").format(report) if own.is_dir() else "\u2013"
