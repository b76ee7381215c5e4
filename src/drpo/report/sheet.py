"""A table of text, as commands print it."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Args:
        title: one line.
        head: of the columns.
        rows: each as long as the head.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_sheet(console: Console, sheet: Sheet, right: Sequence[int] = ()) -> None:
    """Print a table; the columns named in `right` are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=sheet.title, title_justify="left")
    for i, name in enumerate(sheet.head):
        table.add_column(name, justify="right" if i in right else "left")
    for row in sheet.rows:
        table.add_row(*row)
    console.print(table)
    console.print()
