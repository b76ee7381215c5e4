"""A comparison on the terminal while its trials are trained."""

from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from drpo.errors import one_line
from drpo.lab.trial_result import RUNNING, Trial, read_trial
from drpo.lab.worker_pool import WorkerPool


class ComparisonConsole:
    """The steps done of all trials, and how those under way are doing.

    Args:
        console: a terminal, or where plain lines go.
        live: draw in place; else a line per trial.
        trials: folders of all trials.
    """

    def __init__(self, console: Console, live: bool, trials: list[Path]) -> None:
        self._console, self._live_mode = console, live
        self._trials = {path: read_trial(path) for path in trials}
        self._said = {path for path, trial in self._trials.items() if trial.over}
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
        done = sum(_steps_done(t) for t in self._trials.values())
        self._task = self._progress.add_task("", total=sum(t.steps for t in self._trials.values()), completed=done)
        self._pool: WorkerPool | None = None
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

    def tick(self, pool: WorkerPool) -> None:
        """Look at the trials under way, and say which have ended."""
        self._pool = pool
        for path, status in pool.statuses.items():
            if path in self._said:
                continue
            self._trials[path] = read_trial(path)
            if status != RUNNING:
                self._said.add(path)
                self._say(self._trials[path], status)
        done = sum(_steps_done(t) for t in self._trials.values())
        over = sum(t.over for t in self._trials.values())
        self._progress.update(self._task, completed=done, description=f"{over} of {len(self._trials)} trials")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def _say(self, trial: Trial, status: str) -> None:
        n = sum(t.over for t in self._trials.values())
        ends = [end for _, end in trial.held_out[-1:]]
        held_out = "".join(f", held-out {end:.1%}" if 0 <= end <= 1 else f", held-out {end:.4g}" for end in ends)
        reward = f", reward {trial.rewards[-1]:.3f}" if trial.rewards else ""
        name, why = one_line(trial.name), f" ({one_line(trial.reason)})" if trial.reason else ""
        self._console.print(
            Text(f"{n:4d} of {len(self._trials)}  {name}: {status}{reward}{held_out}{why}"), soft_wrap=True
        )

    def _draw(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, justify in (("trial", "left"), ("step", "right"), ("reward", "right"), ("|π-μ| p99", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        statuses = {} if self._pool is None else self._pool.statuses
        for path, status in statuses.items():
            if status == RUNNING:
                trial = self._trials[path]
                rewards, shifts = trial.rewards, trial.series["prob_diff_p99"]
                table.add_row(
                    one_line(trial.name),
                    f"{len(rewards)}/{trial.steps}",
                    f"{rewards[-1]:.3f}" if rewards else "-",
                    f"{shifts[-1]:.3f}" if shifts and shifts[-1] is not None else "-",
                )
        return Stack(table, self._progress)


def _steps_done(trial: Trial) -> int:
    return trial.steps if trial.over else len(trial.rewards)
