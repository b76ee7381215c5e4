"""A comparison on the terminal while its trials are trained."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.text import Text

from drpo.errors import one_line
from drpo.lab.trial_result import RUNNING, Trial, read_trial
from drpo.lab.worker_pool import WorkerPool
from drpo.live.follow import Follower, View
from drpo.live.step_table import steps_bar
from drpo.live.watch import draw_views


class ComparisonConsole:
    """The steps done of all trials, and those under way as `drpo watch` shows them.

    Args:
        console: a terminal, or where plain lines go.
        live: draw in place; else a line per trial.
        trials: folders of all trials.
    """

    def __init__(self, console: Console, live: bool, trials: Sequence[Path]) -> None:
        self._console, self._in_place = console, live
        known = {path: read_trial(path) for path in trials}
        self._over = {path for path, trial in known.items() if trial.over}
        self._steps = {path: _steps_done(trial) for path, trial in known.items()}
        self._ended = set(self._over)
        self._followers: dict[Path, Follower] = {}
        self._views: Sequence[View] = ()
        self._progress = steps_bar(console, "{task.description}")
        total, done = sum(c.steps for c in known.values()), sum(self._steps.values())
        self._task = self._progress.add_task("", total=total, completed=done)
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._draw)

    def __enter__(self) -> "ComparisonConsole":
        """Begin to draw."""
        if self._in_place:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last picture standing."""
        if self._in_place:
            self._live.__exit__(kind, error, trace)

    def tick(self, pool: WorkerPool) -> None:
        """Look at the trials under way, and say which have ended."""
        statuses = pool.statuses
        running = [path for path, status in statuses.items() if status == RUNNING]
        self._views = [self._followers.setdefault(path, Follower(path)).look() for path in running]
        self._steps |= {path: view.step for path, view in zip(running, self._views, strict=True)}
        for path, status in statuses.items():
            if status != RUNNING and path not in self._ended:
                self._end(path, status)
        description = f"{len(self._over)} of {len(self._steps)} trials"
        self._progress.update(self._task, completed=sum(self._steps.values()), description=description)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text, style="yellow"), soft_wrap=True)

    def _end(self, path: Path, status: str) -> None:
        trial = read_trial(path)
        self._ended.add(path)
        self._over |= {path} if trial.over else set()
        self._steps[path] = _steps_done(trial)
        self._followers.pop(path, None)
        ends = [end for _, end in trial.held_out[-1:]]
        held_out = "".join(f", held-out {end:.1%}" if 0 <= end <= 1 else f", held-out {end:.4g}" for end in ends)
        reward = f", reward {trial.rewards[-1]:.3f}" if trial.rewards else ""
        name, why = one_line(trial.name), f" ({one_line(trial.reason)})" if trial.reason else ""
        counted = f"{len(self._over):4d} of {len(self._steps)}"
        self._console.print(Text(f"{counted}  {name}: {status}{reward}{held_out}{why}"), soft_wrap=True)

    def _draw(self) -> RenderableType:
        return Stack(draw_views(self._views, self._console.width), self._progress)


def _steps_done(trial: Trial) -> int:
    return trial.steps if trial.over else len(trial.rewards)
