"""A comparison on the terminal while its cells are trained."""

from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drpo.errors import one_line
from drpo.lab.crew import Work
from drpo.lab.outcome import RUNNING, Cell, read_cell


class ComparisonConsole:
    """The steps done of all cells, and how those under way are doing.

    Args:
        console: a terminal, or where plain lines go.
        live: draw in place; else a line per cell.
        cells: folders of all cells.
    """

    def __init__(self, console: Console, live: bool, cells: list[Path]) -> None:
        self._console, self._live_mode = console, live
        self._cells = {path: read_cell(path) for path in cells}
        self._said = {path for path, cell in self._cells.items() if cell.over}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        done = sum(_steps_done(c) for c in self._cells.values())
        self._task = self._progress.add_task("", total=sum(c.steps for c in self._cells.values()), completed=done)
        self._work: Work | None = None
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._draw)

    def __enter__(self) -> "ComparisonConsole":
        """Begin to draw."""
        if self._live_mode:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        if self._live_mode:
            self._live.__exit__(kind, error, trace)

    def tick(self, work: Work) -> None:
        """Look at the cells under way, and say which have ended."""
        self._work = work
        for path, status in work.statuses.items():
            if path in self._said:
                continue
            self._cells[path] = read_cell(path)
            if status != RUNNING:
                self._said.add(path)
                self._say(self._cells[path], status)
        done = sum(_steps_done(c) for c in self._cells.values())
        over = sum(c.over for c in self._cells.values())
        self._progress.update(self._task, completed=done, description=f"{over} of {len(self._cells)} cells")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def _say(self, cell: Cell, status: str) -> None:
        n = sum(c.over for c in self._cells.values())
        ends = [end for _, end in cell.accuracies[-1:]]
        accuracy = "".join(f", held-out {end:.1%}" if 0 <= end <= 1 else f", held-out {end:.4g}" for end in ends)
        reward = f", reward {cell.rewards[-1]:.3f}" if cell.rewards else ""
        name, why = one_line(cell.name), f" ({one_line(cell.reason)})" if cell.reason else ""
        self._console.print(
            Text(f"{n:4d} of {len(self._cells)}  {name}: {status}{reward}{accuracy}{why}"), soft_wrap=True
        )

    def _draw(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, justify in (("cell", "left"), ("step", "right"), ("reward", "right"), ("|π-μ| p99", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        statuses = {} if self._work is None else self._work.statuses
        for path, status in statuses.items():
            if status == RUNNING:
                cell = self._cells[path]
                rewards, shifts = cell.rewards, cell.series["prob_diff_p99"]
                table.add_row(
                    one_line(cell.name),
                    f"{len(rewards)}/{cell.steps}",
                    f"{rewards[-1]:.3f}" if rewards else "-",
                    f"{shifts[-1]:.3f}" if shifts and shifts[-1] is not None else "-",
                )
        return Stack(table, self._progress)


def _steps_done(cell: Cell) -> int:
    return cell.steps if cell.over else len(cell.rewards)
