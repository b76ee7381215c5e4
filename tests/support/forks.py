"""Processes forked from the tests' own, in which everything is imported already: a new python takes seconds."""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from drpo.train.callbacks import NullCallback

SECONDS = 240
"""After which a fork counts as hung; none is that slow."""


@dataclass(frozen=True)
class Fork:
    """A process under way.

    Args:
        process: it.
        out: the file that takes its standard output and error.
    """

    process: BaseProcess
    out: Path

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit status, negative where a signal killed it, and what it printed."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode or 0, self.out.read_text(encoding="utf-8")


def fork(
    out: Path,
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Fork:
    """Call a function in a fork of this process; an integer that it returns is the exit status.

    Args:
        out: a new file for what it prints.
        function: called with `arguments`, on one thread: those of a pool do not survive a fork.
        environment: added to this process's.
        folder: its working folder; None for this process's.
    """
    process = get_context("fork").Process(
        target=_in_fork, args=(out, function, arguments, environment or {}, folder or Path.cwd())
    )
    process.start()
    return Fork(process, out)


def _in_fork(
    out: Path, function: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str], folder: Path
) -> None:
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115 (until the end)
    # The server of forks that this process may have is its own child, and not that of the fork.
    vars(forkserver._forkserver).update(_forkserver_pid=None, _forkserver_alive_fd=None, _forkserver_address=None)
    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    status = function(*arguments)
    sys.exit(status if isinstance(status, int) else 0)


class KillItself(NullCallback):
    """Kills its process as a power cut would.

    Args:
        after: steps that are done before.
        phase: of the next step, at whose beginning it happens.
    """

    def __init__(self, after: int, phase: str) -> None:
        self.after, self.at, self.done = after, phase, 0

    def stepped(self, step: int, *_: Any) -> None:
        """Count the steps."""
        self.done = step

    def phase(self, name: str) -> None:
        """Kill, if it is time."""
        if (self.done, name) == (self.after, self.at):
            os.kill(os.getpid(), signal.SIGKILL)
