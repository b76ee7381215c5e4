"""The report of a comparison: report.html."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from drpo.lab.outcome import Cell, Comparison
from drpo.report.comparison_data import comparison_data
from drpo.report.html import REPORT, Page, write
from drpo.report.payload import json_bytes
from drpo.train.records import CELLS

STYLES = ("comparison.css",)
SCRIPTS = ("sortable.js", "comparison_plots.js", "comparison.js")


def write_comparison_report(folder: Path, comparison: Comparison, out: Path | None = None) -> Path:
    """Write the report of a comparison; return its path.

    Args:
        folder: of the comparison, finished or not.
        comparison: what was read from it.
        out: the file; None for report.html in the folder.
    """
    path = out or folder / REPORT
    pages = {cell.name: cell_page(folder, cell, path.parent) for cell in comparison.cells}
    page = Page(
        title=f"{comparison.name}: {len(comparison.objectives)} objectives compared",
        body="comparison.html",
        styles=STYLES,
        scripts=SCRIPTS,
        payloads={"comparison": json_bytes({**comparison_data(comparison), "pages": pages})},
    )
    return write(page, path)


def cell_page(folder: Path, cell: Cell, start: Path) -> dict[str, Any]:
    """Return where a cell's own report is: "link", from `start`, where it is there, and else the "command" to make it.

    Args:
        folder: of the comparison; the command is one to give in it.
        cell: one of its cells. Where its folder is gone both are None.
        start: folder of the page that links to it.
    """
    own = folder / CELLS / cell.name
    link, command = None, None
    if (own / REPORT).is_file():
        link = quote(Path(os.path.relpath(own / REPORT, start)).as_posix())
    elif own.is_dir():
        command = f"drpo report {CELLS}/{cell.name}"
    return {"link": link, "command": command}
