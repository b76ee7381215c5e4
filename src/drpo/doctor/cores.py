"""Whether other programs use the cores while the doctor looks."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from drpo.doctor.finding import Finding

MOST_BY_OTHERS = 0.5
"""Cores that other programs may keep busy; a neighbour that waits for its next request takes less."""


@dataclass(frozen=True)
class CoreTimes:
    """Seconds up to now.

    Args:
        clock: of the clock.
        busy: that the cores this process may use were not idle, summed over them.
        own: of processor, of this process and those that it began.
    """

    clock: float
    busy: float
    own: float


def core_times() -> CoreTimes:
    """Return the times up to now; what another machine takes of the same processor is busy, where the system tells."""
    here = psutil.Process()
    ended = here.cpu_times()
    own = ended.user + ended.system + getattr(ended, "children_user", 0.0) + getattr(ended, "children_system", 0.0)
    for child in here.children(recursive=True):
        with suppress(psutil.Error):  # it ended in between
            times = child.cpu_times()
            own += times.user + times.system
    return CoreTimes(time.monotonic(), sum(map(_busy, _usable())), own)


def _usable() -> list[Any]:
    """Return the times of each core that this process may use."""
    each = psutil.cpu_times(percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(each))
    return [times for core, times in enumerate(each) if core in mine]


def _busy(times: Any) -> float:
    rest = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is also in user and nice
    return float(sum(times) - sum(getattr(times, name, 0.0) for name in rest))


def by_others(began: CoreTimes, ended: CoreTimes) -> Finding | None:
    """Return a note if other programs kept more than `MOST_BY_OTHERS` cores busy between two times, else None.

    Args:
        began: times.
        ended: later times.

    Example:
        >>> finding = by_others(CoreTimes(0, 0, 0), CoreTimes(10, 18, 5))
        >>> finding.figure
        'other programs kept 1.3 cores busy meanwhile'
        >>> by_others(CoreTimes(0, 0, 0), CoreTimes(10, 19, 18)) is None
        True
    """
    passed = max(ended.clock - began.clock, 1e-9)
    used = (ended.busy - began.busy - (ended.own - began.own)) / passed
    if used <= MOST_BY_OTHERS:
        return None
    return Finding(
        "cores",
        "note",
        f"other programs kept {used:.1f} cores busy meanwhile",
        f"at most {MOST_BY_OTHERS:g}",
        "steps take longer than they would alone, and times cannot be compared: end the others, wait for them, or set "
        "GOMP_SPINCOUNT=1000 in the environment, with which threads on Linux sleep while they wait",
        {"cores_of_others": used},
    )
