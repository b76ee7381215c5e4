"""Trains the cells of a comparison, goes on with those that were cut short, and keeps what came of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from drpo.errors import InputError
from drpo.files import require_own
from drpo.lab.crew import LOG, Crew, Work
from drpo.lab.outcome import Comparison, cells_of, read_cell, read_comparison, save_results
from drpo.train.config import load_run
from drpo.train.records import CELLS, RESULTS
from drpo.train.stop import StopRequest

TICK = 1.0
"""Seconds between looks at the cells."""


def begun(folder: Path) -> list[Path]:
    """Return the folders of a comparison's cells.

    Raises:
        InputError: there are none.
    """
    cells = cells_of(folder)
    if not cells:
        raise InputError(f"{folder}: no comparison there ({CELLS}/ is missing or empty)")
    return cells


def compare(
    folder: Path,
    cells: Sequence[Path],
    crew: Crew,
    tick: Callable[[Work], None],
    note: Callable[[str], None],
) -> tuple[Comparison, int | None]:
    """Train the cells that have no result yet, and write results.json.

    A cell that was stopped, that failed or whose process died goes on from its last checkpoint.

    Args:
        folder: of the comparison.
        cells: folders of its cells, in the order in which they are begun.
        crew: how many at once.
        tick: is called once a second.
        note: is told what is worth a line.

    Returns:
        The comparison as it then stands, and the signal that ended it early, or None.
    """
    todo = [cell for cell in cells if not read_cell(cell).over]
    for path in (folder / CELLS, *todo):
        require_own(path)
    with StopRequest(note) as stop:
        work = Work(todo, crew, folder / LOG)
        try:
            passed_on = False
            while not work.wait(TICK):
                tick(work)
                if stop.signal is not None and not passed_on:
                    work.interrupt()
                    passed_on = True
            tick(work)
        except BaseException:
            work.kill()
            raise
        finally:
            work.close()
    comparison = read_comparison(folder)
    save_results(comparison, folder / RESULTS)
    return comparison, stop.signal


def models_of(cells: Sequence[Path]) -> set[str]:
    """Return the models that the cells train."""
    return {load_run(cell).model for cell in cells}
