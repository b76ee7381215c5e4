"""`drpo exact`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from drpo.cli.options import parse
from drpo.cli.output import writing_folder
from drpo.report.theory import Sheet, exact_report
from drpo.terminal import Terminal


@dataclass(frozen=True)
class ExactOptions:
    """Check the theory on problems small enough to be computed exactly; seconds, and nothing is trained.

      drpo exact --out exact

    A policy over a long-tailed vocabulary, every expectation a sum over all words: where each objective's gradient
    leads a token, how its variance grows as a word becomes rare, from what drift on it is biased, and who learns what
    from a tail that is noise or holds the best word. docs/theory_checked.md explains what is found.

    Args:
        out: the folder for exact.json, exact.md (the tables) and the figures.
    """

    out: Path = Path("exact")


def exact(arguments: list[str]) -> int:
    """`drpo exact [--out FOLDER]`; 1 where a check fails."""
    options = parse(ExactOptions, arguments, "drpo exact")
    console = Terminal()
    with writing_folder("--out", options.out), Terminal(stderr=True).status("computing"):
        found = exact_report(options.out)
    for sheet in found:
        print_sheet(console, sheet)
    console.print(f"figures, exact.json and exact.md: {options.out}")
    return 0 if all(row[-1] == "yes" for row in found[0].rows) else 1


def print_sheet(console: Console, sheet: Sheet, right: Sequence[int] = ()) -> None:
    """Print a table; the columns named in `right` are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=sheet.title, title_justify="left")
    for i, name in enumerate(sheet.head):
        table.add_column(name, justify="right" if i in right else "left")
    for row in sheet.rows:
        table.add_row(*row)
    console.print(table)
    console.print()
