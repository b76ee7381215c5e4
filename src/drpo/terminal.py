"""What lies between records and the terminal: nothing that a record says can steer it, or look like something else."""

import logging
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

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
