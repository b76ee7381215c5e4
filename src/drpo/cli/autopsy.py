"""The implementation of `drpo autopsy`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from drpo.autopsy.dumped import Format
from drpo.autopsy.formats import find_dumps
from drpo.autopsy.judge import LACKING, Judgement, compared, judge, onset
from drpo.autopsy.steps import records_of
from drpo.cli.commands.autopsy import AutopsyOptions
from drpo.cli.doctor import print_finding
from drpo.errors import InputError, counted
from drpo.lab.replay import Recorded, Replay, batch_of
from drpo.lab.replay import replay as replayed
from drpo.methods import parse_objective
from drpo.objectives import REGISTRY, Objective, needed_divergence
from drpo.report.autopsy_page import autopsy_page
from drpo.report.figures import brief
from drpo.report.html import write
from drpo.report.payload import finite
from drpo.report.replay import replay_sheets
from drpo.report.words import where_it_held
from drpo.spec import format_spec
from drpo.terminal import Sheet, Terminal, as_table

EVIDENCE = (
    *("reward_mean", "groups_with_signal", "groups_all_wrong", "groups_all_correct", "truncated"),
    *("length_terminated", "characters_terminated", "entropy", "ratio_mean", "ratio_max", "k3", "out_of_region"),
    "grad_norm",
)
"""Figures that are shown as the run began, before it went wrong, and as it ended."""
MOST_SAMPLED = 300_000
"""Tokens of the report's rollouts; of more, every few steps are shown."""


def autopsy(files: Sequence[Path], options: AutopsyOptions) -> int:
    """Say why a run collapsed, from its dump."""
    asked = [parse_objective(text) for text in options.objectives]
    dumps = find_dumps(files)
    held_out = find_dumps(options.held_out, "--held-out ") if options.held_out else None
    objective = parse_objective(options.objective or dumps.files[0][1].objective)
    if needed_divergence(objective.needs) is not None:
        raise InputError(f"--objective {options.objective}: reads a divergence, which no dump has; name another")
    found = judge(dumps, objective, held_out)
    batch = _batch(found, options.step)
    replay = None if batch is None else replayed(batch, asked)
    console = Terminal(stderr=options.json)
    if options.json:
        print(json.dumps(finite(_as_json(found, objective, replay)), indent=1))
    else:
        _show(console, found, objective)
        if replay is not None and batch is not None:
            console.print(_replayed(found, replay), style="bold", soft_wrap=True)
            console.print(*(part for sheet in replay_sheets(replay, batch, None) for part in (as_table(sheet), "")))
    if options.out is not None:
        console.print(f"report  {_write(found, objective, options.out)}", soft_wrap=True)
    return 0


def verdict(found: Judgement) -> Iterator[str]:
    """Yield what went wrong, the first first, a line each."""
    first, last = found.metrics[0]["step"], found.metrics[-1]["step"]
    if not found.warnings:
        yield f"nothing went wrong that shows in this dump: no warning held from step {first} to step {last}"
    for i, warning in enumerate(found.warnings):
        text = in_words_of(found.formats, warning["text"])
        yield f"{'why' if i == 0 else 'then'}: {warning['name']}, {where_it_held(warning)}: {text}"


def in_words_of(formats: Sequence[Format], text: str) -> str:
    """Return an advice with the framework's option beside each of ours.

    Example:
        >>> from drpo.autopsy.trl import FORMAT
        >>> in_words_of([FORMAT], "more --sampling.samples")
        'more num_generations (--sampling.samples)'
    """
    options: Mapping[str, str] = next((f.options for f in formats if f.options), {})
    for ours, theirs in options.items():
        text = text.replace(ours, f"{theirs} ({ours})")
    return text


def _show(console: Terminal, found: Judgement, objective: Objective) -> None:
    for line in verdict(found):
        console.print(line, style="bold", soft_wrap=True)
    for name, value in _read(found, objective):
        console.print(f"{name:<8}{value}", soft_wrap=True)
    console.print("")
    console.print(as_table(_evidence(found)), "")
    if found.findings:
        console.print(f"What drpo doctor says of step {found.metrics[0]['step']}, the first of the dump", style="bold")
    for finding in found.findings:
        print_finding(console, finding)
    for line in _cannot(found):
        console.print(Text(line), soft_wrap=True)
    console.print("")


def _read(found: Judgement, objective: Objective) -> Iterator[tuple[str, str]]:
    kinds = ", ".join(" ".join(filter(None, (f.name, f.version))) for f in found.formats)
    steps = f"{counted(len(found.metrics), 'step')}, {found.metrics[0]['step']} to {found.metrics[-1]['step']}"
    held_out = f", {found.n_held_out:,} held out" if found.n_held_out else ""
    files = f"{counted(found.n_files, 'file')} in the form of {kinds}"
    yield "read", f"{files}: {steps}; {found.n_rollouts:,} rollouts{held_out}"
    yield "judged", f"with the region and the gradient of {format_spec(objective, REGISTRY)} (--objective)"
    for note in found.notes:
        yield "note", note


def _evidence(found: Judgement) -> Sheet:
    rows = [
        (name, *("" if mean is None else brief(mean) for mean in means)) for name, *means in compared(found, EVIDENCE)
    ]
    head = ("means of five steps", "first", f"to step {onset(found)}", "last")
    return Sheet("", head, tuple(rows))


def _cannot(found: Judgement) -> Iterator[str]:
    for name, remedy in found.remedies.items():
        what, questions = LACKING[name]
        yield f"not in the dump: {what}, so no answer to {questions}" + (f"; {remedy}" if remedy else "")


def _replayed(found: Judgement, replay: Replay) -> str:
    of_step = next(record for record in found.metrics if record["step"] == replay.step)
    return f"Step {replay.step} under other objectives: {replay.tokens:,} of its {of_step['trained_tokens']:,} tokens"


def _batch(found: Judgement, step: int | None) -> Recorded | None:
    """The sampled rollouts of the step to replay; None where no step has both log-probabilities."""
    trained = [at for at, rollouts in found.sample.items() if any(r.logp is not None for r in rollouts)]
    if step is not None and step not in trained:
        known = f"those of steps {trained[0]} to {trained[-1]} have them" if trained else "no other step has any"
        raise InputError(f"--step {step}: no rollouts with both log-probabilities; {known}")
    if not trained:
        return None
    at = min(trained, key=lambda s: abs(s - onset(found))) if step is None else step
    records = list(records_of(at, found.sample[at]))
    if not any("logp" in record for record in records):
        return None
    return batch_of(Path(found.formats[0].name), records, None, "episode")


def _as_json(found: Judgement, objective: Objective, replay: Replay | None) -> dict[str, Any]:
    return {
        "verdict": list(verdict(found)),
        "began": found.warnings[0]["first_step"] if found.warnings else None,
        "warnings": found.warnings,
        "formats": [{"name": f.name, "version": f.version} for f in found.formats],
        "files": found.n_files,
        "rollouts": found.n_rollouts,
        "held_out": found.n_held_out,
        "objective": format_spec(objective, REGISTRY),
        "notes": found.notes,
        "findings": [asdict(f) for f in found.findings],
        "lacking": [
            {"name": name, "questions": LACKING[name][1], "remedy": remedy} for name, remedy in found.remedies.items()
        ],
        "metrics": found.metrics,
        "evaluations": found.evaluations,
        "replay": None if replay is None else asdict(replay),
    }


def _write(found: Judgement, objective: Objective, out: Path) -> Path:
    """Write the report; of many tokens, every few steps are shown."""
    total = sum(r.length for rollouts in found.sample.values() for r in rollouts)
    stride = max(1, -(-total // MOST_SAMPLED))
    shown = list(found.sample)[::stride]
    page = autopsy_page(
        title=f"Autopsy of {found.formats[0].name}: {counted(len(found.metrics), 'step')}",
        lines=list(verdict(found)),
        summary=[*_read(found, objective), *(("lacking", line) for line in _cannot(found))],
        metrics=found.metrics,
        evaluations=found.evaluations,
        records={step: list(records_of(step, found.sample[step])) for step in shown},
        n_all=found.n_rollouts,
        objective=objective,
    )
    return write(page, out)
