"""Output to the terminal that is safe for text from untrusted records."""

import logging
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from drpo.errors import printable

FILE_WIDTH = 110
"""Of output to a file or a pipe, unless COLUMNS says otherwise."""
_PADDING = re.compile(r" +(?=\n)")


def without_padding(text: str) -> str:
    """Return a text whose lines do not end with spaces, such as those that fill the last column of a table.

    Example:
        >>> without_padding("a  b  \\nc   \\n")
        'a  b\\nc\\n'
    """
    return _PADDING.sub("", text)


class Terminal(Console):
    """A console without markup; control, bidi and separator characters are shown as U+FFFD.

    All output passes through `render`, so callers need not escape their text. Where it is no terminal it has
    `FILE_WIDTH` columns, and no line ends with the spaces that fill a table's last column.

    Args:
        options: of rich's Console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal and "width" not in options and "COLUMNS" not in os.environ:
            self.width = FILE_WIDTH

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, with unsafe characters replaced."""
        for segment in super().render(renderable, options):
            text = segment.text
            plain = segment.control or (text.isascii() and text.isprintable()) or text == "\n"
            yield segment if plain else Segment(printable(text), segment.style)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        text = super()._render_buffer(buffer)
        return text if self.is_terminal else without_padding(text)


class LogLines(logging.Handler):
    """Prints each message of a log on standard error, in a line of its own, however long."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Terminal(stderr=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        try:
            self._console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:  # as of all handlers
            self.handleError(record)


class PrintableRecord(logging.LogRecord):
    """A log record whose message may quote an untrusted file."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        """Return the message in one line, with unsafe characters replaced."""
        return printable(" ".join(super().getMessage().splitlines()))


@dataclass(frozen=True)
class Sheet:
    """A table of text, for the terminal, a report or a document.

    Args:
        title: one line; may be empty.
        head: names of the columns.
        rows: each as long as the head.
        reading: how to read it, in a sentence below the title; may be empty.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    reading: str = ""


def as_table(sheet: Sheet, left: int = 1, bold: Collection[int] = ()) -> Table:
    """Return a sheet as a rich table; a number that does not fit is broken, not cut.

    Args:
        sheet: the table.
        left: number of leading columns that are text, not numbers.
        bold: indices of rows in bold.
    """
    title = "\n".join(line for line in (sheet.title, sheet.reading) if line)
    table = Table(box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    for i, name in enumerate(sheet.head):
        if i < left:
            table.add_column(name, no_wrap=True)
        else:
            table.add_column(name, justify="right", overflow="fold")
    for i, row in enumerate(sheet.rows):
        table.add_row(*row, style="bold" if i in bold else None)
    return table
