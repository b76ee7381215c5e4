"""Kill process trees; on Linux, including descendants that detached from their parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Collection
from contextlib import suppress

import psutil

_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # linux/prctl.h
_ROUNDS = 100


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, for any reason. No effect outside Linux."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that `end_children` finds them. Linux only."""
    _prctl(_SET_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_tree(pid: int) -> None:
    """Kill a process, its descendants and its process group.

    Args:
        pid: of a process that leads its own group. If it is dead, the rest of its group is killed.
    """
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        root.suspend()  # so it cannot start processes during the search
        _kill_below(root, spared=())
        root.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_children(spared: Collection[int]) -> None:
    """Kill and reap the descendants of this process, except the children `spared` and theirs."""
    if not _has_children():
        return
    _kill_below(psutil.Process(), spared)
    for pid in children() - set(spared):
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def children() -> frozenset[int]:
    """The process ids of this process's children."""
    return frozenset(child.pid for child in psutil.Process().children()) if _has_children() else frozenset()


def _has_children() -> bool:
    """Whether there are children; takes a microsecond and consumes no exit status."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _kill_below(root: psutil.Process, spared: Collection[int]) -> None:
    """Kill in rounds until none is left: a process that was just starting shows up in the next round."""
    for _ in range(_ROUNDS):
        descendants = [p for child in root.children() if child.pid not in spared for p in (child, *_descendants(child))]
        living = [process for process in descendants if _lives(process)]
        if not living:
            return
        for end in (psutil.Process.suspend, psutil.Process.kill):
            for process in living:
                with suppress(psutil.Error):
                    end(process)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
