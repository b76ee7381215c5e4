"""Check the theory on problems that can be computed exactly: `python studies/theory.py --help`."""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import Progress

from command import run
from drpo.cli.options import parse
from drpo.cli.output import writing_folder
from drpo.files import write_text
from drpo.report.payload import finite
from drpo.terminal import Sheet, Terminal, as_table
from exact.checks import Theory, checks, examine
from exact.figures import FIGURES
from exact.tables import markdown, sheets
from exact.variance import MUS


@dataclass(frozen=True)
class TheoryOptions:
    """Check the theory on problems that can be computed exactly. Nothing is trained; about a minute.

      python studies/theory.py --out exact

    The policy has a long-tailed vocabulary, and every expectation is a sum over all tokens. The checks cover the fixed
    point of each objective's gradient, its variance for rare tokens, its off-policy bias, and learning from a tail that
    is noise or holds the best token. docs/theory_checked.md explains the results. The exit status is 1 if a check
    fails.

    Args:
        out: the folder for exact.json, exact.md (the tables) and the figures.
    """

    out: Path = Path("exact")


def theory(arguments: Sequence[str]) -> int:
    """Compute, write and print everything; return 1 if a check fails."""
    options = parse(TheoryOptions, list(arguments), "python studies/theory.py")
    with writing_folder("--out", options.out):
        results = examine(_progress)
        tables = write_report(options.out, results)
    console = Terminal()
    for sheet in tables:
        console.print(as_table(sheet, left=len(sheet.head)), "")
    console.print(f"figures, exact.json and exact.md: {options.out}")
    return 0 if all(check.agrees for check in checks(results)) else 1


def write_report(folder: Path, results: Theory) -> tuple[Sheet, ...]:
    """Write `exact.json`, `exact.md` and the figures into a folder; return the tables."""
    record = finite({"checks": [asdict(c) for c in checks(results)], **asdict(results), "variance_mu": MUS})
    write_text(folder / "exact.json", json.dumps(record, indent=1) + "\n")
    tables = sheets(results)
    write_text(folder / "exact.md", "\n\n".join(f"**{s.title}**\n\n{markdown(s)}" for s in tables) + "\n")
    for name, draw in FIGURES.items():
        draw(results, folder / name)
    return tables


def _progress(parts: Collection[str]) -> Iterable[str]:
    """Yield the parts, with a progress bar."""
    with Progress(console=Terminal(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(parts))
        for part in parts:
            progress.update(task, description=part.replace("_", " "))
            yield part
            progress.advance(task)


if __name__ == "__main__":
    sys.exit(run(theory))
