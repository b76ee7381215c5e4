"""The report of a run of supervised fine-tuning: curves, time and configuration."""

from collections.abc import Sequence
from pathlib import Path

from drpo.report.html import REPORT, Page, Section, write
from drpo.report.panels import Levels, Line, Panel, Records, curves, lines_of, numbers
from drpo.report.run_page import chapter_lines, time_section
from drpo.report.run_summary import ended_early, machine, texts
from drpo.terminal import Sheet
from drpo.train.chapters import read_chapters
from drpo.train.config import to_json
from drpo.train.config.sft import SFTConfig, load_sft
from drpo.train.records import ENVIRONMENT, EVALUATIONS, METRICS, TIMING, read_json, read_records

PANELS = (
    Panel("Training loss", "nats a token", "Mean -log π over the update's trained tokens.", {"nll": "training"}),
    Panel("Entropy", "nats", "Mean over the trained tokens.", {"entropy": "mean"}),
    Panel("Gradient norm", "L2 norm", "Before clipping.", {"grad_norm": "norm"}, log=True),
    Panel("Learning rate", "", "Of each update.", {"learning_rate": "rate"}),
)
CURVES = (
    "One point per update. The held-out loss is of conversations that are never trained on: where it rises while the "
    "training loss falls, the model learns the data by heart, and fewer epochs are better."
)


def write_sft_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run of supervised fine-tuning; return its path.

    Args:
        folder: of the run, finished or not.
        out: the file; None for report.html in the folder.
    """
    return write(sft_page(folder), out or folder / REPORT)


def sft_page(folder: Path) -> Page:
    """Return the page of a run of supervised fine-tuning.

    Args:
        folder: of the run, finished or not.
    """
    config = load_sft(folder)
    metrics, evaluations = read_records(folder / METRICS), read_records(folder / EVALUATIONS)
    losses = [f"{e['nll']:.4f}" for e in evaluations]
    ends = losses if len(losses) < 2 else [losses[0], losses[-1]]
    return Page(
        kind="report",
        title=f"{config.name}: {config.model.name} learns {config.data.path}, seed {config.seed}",
        caution="",
        result=("Held-out loss", " \u2192 ".join(ends)),
        lines=[f"after step {e['step']}: {e['nll']:.4f} nats a token" for e in evaluations] or ["Nothing is held out."],
        summary=_summary(folder, config, metrics),
        sections=[
            _curves_section(metrics, evaluations),
            time_section(read_records(folder / TIMING)),
            _configuration_section(config),
        ],
    )


def _summary(folder: Path, config: SFTConfig, metrics: Records) -> list[tuple[str, str]]:
    tokens = sum(m["trained_tokens"] for m in metrics)
    pairs = [
        *ended_early(folder),
        ("model", config.model.name),
        ("data", config.data.path),
        ("steps done", f"{len(metrics)} of {config.trainer.steps}, up to {config.trainer.batch} conversations each"),
        ("tokens", f"{tokens:,} trained on"),
        ("seed", str(config.seed)),
    ]
    pairs += chapter_lines(read_chapters(folder))
    path = folder / ENVIRONMENT
    return [*pairs, ("machine", machine(read_json(path)))] if path.exists() else pairs


def _curves_section(metrics: Records, evaluations: Records) -> Section:
    """The curves of the updates, and that of the held-out loss."""
    drawn: list[tuple[Panel, Sequence[Line], Levels]] = [(panel, lines_of(panel, metrics), ()) for panel in PANELS]
    held_out = Line("held out", [e["step"] for e in evaluations], [e["nll"] for e in evaluations])
    drawn.insert(1, (Panel("Held-out loss", "nats a token", "Of all held-out conversations.", {}), [held_out], ()))
    known = [(panel, lines, flat) for panel, lines, flat in drawn if any(line.known for line in lines)]
    plots = [curves(f"panel-{i}", panel, {"": lines}, flat) for i, (panel, lines, flat) in enumerate(known)]
    return Section("curves", "Curves", "Curves", CURVES, plots, [numbers(known)] if known else [])


def _configuration_section(config: SFTConfig) -> Section:
    """Every field, by its path."""
    rows: dict[str, object] = {}
    for group, value in to_json(config).items():
        rows |= {f"{group}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {group: value}
    sheet = Sheet("", ("field", "value"), tuple(texts(rows).items()))
    return Section("configuration", "Configuration", "Configuration", "Every field.", texts=[sheet])
