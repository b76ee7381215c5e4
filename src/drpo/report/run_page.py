"""The report of one run: report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from drpo.errors import counted
from drpo.objectives import REGISTRY, Objective, caution
from drpo.report.browser import columns, table, vocabulary
from drpo.report.distribution import histogram_plot, scatter_plots
from drpo.report.html import REPORT, Page, Section, write
from drpo.report.panels import Records, curves, drawn_lines, numbers
from drpo.report.payload import column_bytes, json_bytes
from drpo.report.run_summary import (
    configuration,
    ended_early,
    held_out,
    phase_seconds,
    run_summary,
    shares,
    timeline_plot,
)
from drpo.report.token_statistics import Rollouts, read_rollouts
from drpo.report.vocabulary import find_tokenizer, pieces
from drpo.spec import format_spec
from drpo.train.chapters import Chapter, described, read_chapters
from drpo.train.config import Run
from drpo.train.origin import read_origin
from drpo.train.records import ENVIRONMENT, EVALUATIONS, METRICS, TIMING, read_json, read_records
from drpo.train.warmed import outcome, read_before

MOST_TOKENS = 1_500_000
"""More would make a page that is slow to open; of a larger run a share of the groups is shown."""
CURVES = (
    "One point per step. π is the policy as it was before each update, μ the sampler that drew the tokens. A line has "
    "a gap where a step has no number; of long ones the least and the greatest of every few steps are drawn."
)
CHANGED = "Vertical lines are where the run went on with other settings: its chapters, in the summary above."
REGION = (
    "Each point is a trained token. On the diagonal the policy is where the sampler was; the lines are where trust "
    "regions end. Logarithmic axes show the unlikely tokens, where a region in the ratio is narrow and one in |π - μ| "
    "wide; linear axes show the likely ones, where it is the other way round. A name in the legend switches its line "
    "off and on."
)
WEIGHTS = (
    "The gradient of the loss in log π is -A r w, with r = π/μ. w = 1 is the plain policy gradient; the objective "
    "damps a token with w below 1, masks it at 0 and pulls it back below 0."
)
ROLLOUTS = (
    "Every sampled completion, token by token; an episode in an environment is a conversation, in which the sampled "
    "tokens are shaded and all else is plain. Point at a token, or move to it with ← →, for its numbers. j and k, or ↓ "
    "and ↑ with the list in focus, go through the list; / searches, Esc leaves the search."
)
TIME = "Evaluations and checkpoints stand at the step that they follow; step 0 is before training."
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
    rollouts = read_rollouts(folder, run.objective.loss, MOST_TOKENS, run.objective.sequence)
    metrics, evaluations = read_records(folder / METRICS), read_records(folder / EVALUATIONS)
    told, chapters = caution(run.objective.loss), read_chapters(folder)
    held = held_out(evaluations, read_before(folder))
    return Page(
        kind="report",
        title=f"{run.name}: {format_spec(run.objective.loss, REGISTRY)}, seed {run.seed}",
        caution=f"{told}." if told else "",
        result=("Held-out reward", " \u2192 ".join(mean for mean, _ in held)),
        lines=[text for _, text in held] or ["The run was not evaluated."],
        summary=[
            *ended_early(folder),
            *run_summary(run, _environment(folder), metrics, evaluations),
            *_origin(folder),
            *_warm_up(folder),
            *chapter_lines(chapters),
        ],
        sections=[
            curves_section(run, metrics, evaluations, chapters),
            *token_sections(run.objective.loss, run.seed, rollouts),
            time_section(read_records(folder / TIMING)),
            configuration_section(run),
        ],
        scripts=SCRIPTS,
        payloads=browser_payloads(rollouts, find_tokenizer(folder, run)),
    )


def curves_section(run: Run, metrics: Records, evaluations: Records, chapters: Sequence[Chapter] = ()) -> Section:
    """Return the curves of a run, and what they say in numbers."""
    drawn, begins = drawn_lines(run, metrics, evaluations), [chapter.step + 0.5 for chapter in chapters]
    plots = [
        curves(f"panel-{i}", panel, {"": lines}, flat, chapters=begins) for i, (panel, lines, flat) in enumerate(drawn)
    ]
    text = f"{CURVES} {CHANGED}" if chapters else CURVES
    return Section("curves", "Curves", "Curves", text, plots, [numbers(drawn)] if drawn else [])


def chapter_lines(chapters: Sequence[Chapter]) -> list[tuple[str, str]]:
    """Return a pair for each chapter: its number, and what it changed."""
    return [(f"chapter {i}", described(chapter)) for i, chapter in enumerate(chapters, 2)]


def token_sections(objective: Objective, seed: int, rollouts: Rollouts) -> list[Section]:
    """Return where the trained tokens lie, how the objective weighs them, and the rollouts one by one.

    Args:
        objective: the run's.
        seed: of the choice of tokens that are drawn.
        rollouts: of the run.
    """
    weights, missing = histogram_plot(rollouts), "No token was trained on."
    return [
        Section(
            "region",
            "Region",
            "\u03c0 against \u03bc",
            REGION,
            scatter_plots(rollouts, objective, seed),
            missing=missing,
        ),
        Section("weights", "Weights", "Gradient weights", WEIGHTS, [weights] if weights else [], missing=missing),
        Section("rollouts", "Rollouts", "Rollouts", ROLLOUTS, include="rollouts.html"),
    ]


def time_section(timing: Records) -> Section:
    """Return where a run's seconds went."""
    phases = phase_seconds(timing)
    plots, tables = ([timeline_plot(phases)], [shares(phases)]) if phases else ([], [])
    return Section("time", "Time", "Time", TIME, plots, tables)


def configuration_section(run: Run) -> Section:
    """Return a run's configuration."""
    base, *texts = configuration(run)
    return Section("configuration", "Configuration", "Configuration", f"What differs from {base}.", texts=texts)


def browser_payloads(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    """Return the completions of a run, as the page's browser of them reads them.

    Args:
        rollouts: of the run.
        tokenizer: its own; None shows token ids.
    """
    ids = vocabulary(rollouts)
    known = None if tokenizer is None else pieces(tokenizer, ids.tolist())
    places, values = columns(rollouts, ids)
    return {
        "rollouts": json_bytes(table(rollouts, ids, known) | {"values": values}),
        **{name: column_bytes(places.pop(name)) for name in [*places]},
    }


def _origin(folder: Path) -> list[tuple[str, str]]:
    origin = read_origin(folder)
    return [] if origin is None else [("begins from", f"{origin.run} after {counted(origin.step, 'step')}")]


def _warm_up(folder: Path) -> list[tuple[str, str]]:
    told = outcome(folder)
    return [] if told is None else [("warm-up", told)]


def _environment(folder: Path) -> Mapping[str, Any]:
    path = folder / ENVIRONMENT
    return read_json(path) if path.exists() else {}
