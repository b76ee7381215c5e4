"""The report of somebody else's run: curves, trust region and rollouts, as far as its dump has them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from drpo.objectives import REGISTRY, Objective, caution
from drpo.report.html import Page, Section
from drpo.report.panels import (
    PANELS,
    Levels,
    Line,
    Panel,
    Records,
    curves,
    held_out_line,
    lines_of,
    numbers,
    parts_panel,
)
from drpo.report.run_page import CURVES, SCRIPTS, browser_payloads, token_sections
from drpo.report.token_statistics import Rollouts, of_one_step
from drpo.spec import format_spec

_CHARACTERS = Panel(
    "Length in characters",
    "characters",
    "The dump has no tokens. Completions that ended by themselves, and those that were cut.",
    {"characters_terminated": "ended", "characters_truncated": "cut"},
)


def autopsy_page(
    title: str,
    lines: Sequence[str],
    summary: Sequence[tuple[str, str]],
    metrics: Records,
    evaluations: Records,
    records: Mapping[int, Sequence[Mapping[str, Any]]],
    n_all: int,
    objective: Objective,
) -> Page:
    """Return the page of a dump.

    Args:
        title: of the page.
        lines: what went wrong, a line each.
        summary: pairs of a name and a value.
        metrics: of each step.
        evaluations: held-out ones.
        records: step -> rollouts of it, as lines of `rollouts.jsonl`; a sample.
        n_all: how many rollouts the dump has.
        objective: that is asked about the tokens.
    """
    found = Rollouts.cat([of_one_step(of_step, objective) for of_step in records.values()], n_all)
    rollouts = replace(found, states=["unknown" if state == "skipped" else state for state in found.states])
    told = caution(objective)
    return Page(
        kind="report",
        title=title,
        caution=f"{told}." if told else "",
        result=("Judged with", format_spec(objective, REGISTRY)),
        lines=lines,
        summary=summary,
        sections=[_curves(metrics, evaluations), *token_sections(objective, 0, rollouts)],
        scripts=SCRIPTS,
        payloads=browser_payloads(rollouts, None),
    )


def _curves(metrics: Records, evaluations: Records) -> Section:
    panels = (PANELS[0], parts_panel(metrics), _CHARACTERS, *PANELS[1:])
    drawn: list[tuple[Panel, list[Line], Levels]] = [(panel, lines_of(panel, metrics), ()) for panel in panels]
    held_out = held_out_line(evaluations)
    drawn.insert(
        1, (Panel("Held-out reward", "score", "Of evaluations.", {}), [held_out] if held_out.known else [], ())
    )
    known = [(panel, lines, flat) for panel, lines, flat in drawn if lines]
    plots = [curves(f"panel-{i}", panel, {"": lines}, flat) for i, (panel, lines, flat) in enumerate(known)]
    return Section("curves", "Curves", "Curves", CURVES, plots, [numbers(known)] if known else [])
