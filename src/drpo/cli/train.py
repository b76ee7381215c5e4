"""`drpo train` and `drpo recipes`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from drpo.cli.options import described, parse
from drpo.errors import InputError
from drpo.recipes import RECIPES, find
from drpo.report.console import LiveConsole, PlainConsole
from drpo.report.curves import draw_run
from drpo.train import loop
from drpo.train.config import SPELLED, Run, from_json, to_json
from drpo.train.session import MODEL, load_run


@dataclass(frozen=True)
class TrainOptions:
    """Where a run goes and how it is shown.

    Args:
        out: folder of the run; default runs/NAME, with a number behind it where that is taken.
        plain: plain lines in place of the live table.
    """

    out: Path | None = None
    plain: bool = False


def train(arguments: list[str]) -> int:
    """`drpo train RECIPE [overrides]` or `drpo train --resume RUN`."""
    if arguments and arguments[0] == "--resume":
        if len(arguments) < 2:
            raise InputError("train --resume: name the run's folder")
        folder = Path(arguments[1])
        options = parse(TrainOptions, arguments[2:], f"drpo train --resume {folder}")
        return _run(load_run(folder), folder, options)
    if not arguments or arguments[0].startswith("-"):
        if "--help" in arguments or "-h" in arguments:
            print("drpo train RECIPE [--FIELD VALUE ...]\ndrpo train --resume RUN\n\nrecipes:")
            return recipes([])
        raise InputError(f"train: name a recipe first; known: {', '.join(RECIPES)}")
    run, options = overridden(find(arguments[0]), arguments[1:], f"drpo train {arguments[0]}")
    folder = options.out or _free_folder(Path("runs") / run.name)
    if (folder / "config.json").exists():
        raise InputError(f"--out {folder}: a run is there; `drpo train --resume {folder}` goes on with it")
    return _run(run, folder, options)


def _run(run: Run, folder: Path, options: TrainOptions) -> int:
    transformers_logging.disable_progress_bar()
    console = Console()
    live = console.is_terminal and not options.plain
    with LiveConsole(console) if live else PlainConsole(console) as watch:
        summary = loop.train(run, folder, watch)
    picture = draw_run(folder, run)
    _conclude(console, folder, summary, picture)
    return 128 + summary["stopped_by_signal"] if summary["stopped_by_signal"] else 0


def _conclude(console: Console, folder: Path, summary: Mapping[str, Any], picture: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for when in ("before", "after"):
        found = summary[f"accuracy_{when}"]
        if found:
            interval = f"95 % interval {found['low']:.1%} to {found['high']:.1%}" if found["low"] is not None else ""
            table.add_row(f"accuracy {when}", f"{found['accuracy']:.1%}", interval)
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds"].items())
    table.add_row("training", f"{summary['training_seconds']:.1f} s", f"in all: {spent}")
    table.add_row("tokens", f"{summary['sampled_tokens']:,}", f"sampled; {summary['trained_tokens']:,} trained on")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB", "")
    console.print(table)
    console.print(f"curves       {picture}", soft_wrap=True, highlight=False)
    if summary["finished"]:
        console.print(f"model        {folder / MODEL}\neverything   {folder}", soft_wrap=True, highlight=False)
    else:
        console.print(f"stopped early; go on with: drpo train --resume {folder}", soft_wrap=True, highlight=False)


def _free_folder(wanted: Path) -> Path:
    candidates = [wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10000))]
    return next(c for c in candidates if not c.exists())


def recipes(arguments: list[str]) -> int:
    """`drpo recipes`."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise InputError(f"recipes takes no arguments, not {arguments[0]!r}; try `drpo train RECIPE --help`")
    width = max(map(len, RECIPES))
    for name, make in RECIPES.items():
        print(f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}")
    return 0


def overridden(run: Run, arguments: list[str], prog: str) -> tuple[Run, TrainOptions]:
    """Apply `--field value` overrides to a recipe's run."""
    defaults = to_json(run)
    helps = described(Run)
    columns: list[Any] = []
    for f in fields(Run):
        value = getattr(run, f.name)
        kind: Any = str if f.name in SPELLED and value is not None else str | None if f.name in SPELLED else f.type
        shown = value if f.name not in SPELLED else defaults[f.name]
        columns.append((f.name, Annotated[kind, tyro.conf.arg(help=helps[f.name])], field(default=shown)))
    for f in fields(TrainOptions):
        help_text = described(TrainOptions)[f.name]
        columns.append((f.name, Annotated[f.type, tyro.conf.arg(help=help_text)], field(default=f.default)))
    flat = make_dataclass("Fields", columns, frozen=True)
    given: Any = parse(flat, arguments, prog, description=(Run.__doc__ or "").split("Args:")[0])
    record = {f.name: getattr(given, f.name) for f in fields(Run)}
    record["sampling"] = vars(record["sampling"])
    options = TrainOptions(**{f.name: getattr(given, f.name) for f in fields(TrainOptions)})
    return from_json(record), options
