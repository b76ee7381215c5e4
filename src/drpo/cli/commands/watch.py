"""`drpo watch`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from drpo.cli.options import leading, parse
from drpo.cli.runs import reading, require_run
from drpo.errors import InputError, as_typed
from drpo.live.follow import Follower, find_trials
from drpo.live.watch import draw_view, draw_views
from drpo.terminal import Terminal
from drpo.train.records import TRIALS

LONGEST_S = 86_400
"""Upper bound of the interval."""


@dataclass(frozen=True)
class WatchOptions:
    """Follow a run of another process, or a comparison's runs: progress, curves, the last sample.

      drpo watch runs/demo

    It ends when the run does, or on Ctrl-C, which does not affect the run.

    Args:
        once: print the state once and end; the default if the output is not a terminal.
        every: seconds between updates.
    """

    once: bool = False
    every: float = 1.0


def watch(arguments: list[str]) -> int:
    """`drpo watch RUN`: follow a run, or a comparison's runs, until it ends or Ctrl-C."""
    name, rest = leading(arguments, "RUN", "watch: name the run's folder first")
    options = parse(WatchOptions, rest, f"drpo watch {as_typed(name)}")
    if not 0 < options.every <= LONGEST_S:
        raise InputError(f"--every {options.every}: must be above 0 seconds, and at most {LONGEST_S:,}")
    folder = Path(name)
    require_run(folder)
    look = _Look(folder)
    console = Terminal()
    if options.once or not console.is_terminal:
        with reading(folder):
            console.print(look(console)[0])
        return 0
    try:
        with reading(folder):
            _follow(look, console, options.every)
    except KeyboardInterrupt:  # the usual end
        return 0
    return 0


class _Look:
    """Draws the present state of a folder, and returns whether it is final."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._followers: dict[Path, Follower] = {}

    def __call__(self, console: Console) -> tuple[RenderableType, bool]:
        if not (self._folder / TRIALS).is_dir():
            view = self._of(self._folder).look()
            return draw_view(view, console.width), view.summary is not None
        views = [self._of(trial).look() for trial in find_trials(self._folder)]
        # The trials that are still to begin are unknown here, so a comparison is followed until Ctrl-C.
        return draw_views(views, console.width) if views else Text(f"waiting for the runs of {self._folder}"), False

    def _of(self, folder: Path) -> Follower:
        return self._followers.setdefault(folder, Follower(folder))


def _follow(look: Callable[[Console], tuple[RenderableType, bool]], console: Console, every: float) -> None:
    picture, ended = look(console)
    with Live(picture, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not ended:
            time.sleep(every)
            picture, ended = look(console)
            live.update(picture, refresh=True)
