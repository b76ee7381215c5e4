"""What lies between records and the terminal: nothing that a record says can steer it, or look like something else."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from drpo.errors import printable


class Terminal(Console):
    """A console on which text is text: no markup, and control, bidi and separator characters as U+FFFD.

    Whatever is drawn passes through `render`, so what draws need not think of it.

    Args:
        options: of rich's Console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what is drawn of something."""
        for segment in super().render(renderable, options):
            text = segment.text
            plain = segment.control or (text.isascii() and text.isprintable()) or text == "\n"
            yield segment if plain else Segment(printable(text), segment.style)


class PrintableRecord(logging.LogRecord):
    """A log record of any library whose message may quote a stranger's file."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        """Return the message as a terminal may have it."""
        return printable(super().getMessage())


@dataclass(frozen=True)
class Sheet:
    """A table of text, for the terminal, a page or a document.

    Args:
        title: one line; may be empty.
        head: of the columns.
        rows: each as long as the head.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def as_table(sheet: Sheet, left: int = 1, bold: Collection[int] = ()) -> Table:
    """Return a table as rich draws it.

    Args:
        sheet: what it says.
        left: how many columns, from the first, are text and not numbers.
        bold: places of rows that stand out.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", title=sheet.title or None, title_justify="left")
    for i, name in enumerate(sheet.head):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=i < left)
    for i, row in enumerate(sheet.rows):
        table.add_row(*row, style="bold" if i in bold else None)
    return table
