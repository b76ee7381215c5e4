"""Seconds and peak memory of a piece of work; standard library and torch only."""

import ctypes
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter:
    """Measures what happens between `start` and `stop`: on the GPU where there is one, else in resident memory."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._before = 0
        self._begun = 0.0

    def start(self) -> None:
        """Begin: give back what the allocator keeps, reset the high-water mark, start the clock."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _reset_resident()
        self._begun = time.perf_counter()

    def stop(self) -> dict[str, float | None]:
        """End.

        Returns:
            "seconds"; "peak_bytes", the most memory held, and "extra_bytes", how much more that is than was held at
            the start; the last two are None where the system does not tell.
        """
        if self._cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._begun
        peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        if not peak or not self._before:
            return {"seconds": seconds, "peak_bytes": None, "extra_bytes": None}
        return {"seconds": seconds, "peak_bytes": peak, "extra_bytes": peak - self._before}


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_resident() -> int:
    if sys.platform != "linux":
        return 0
    with suppress(OSError, AttributeError):
        # What glibc keeps of freed memory would hide the next allocation. Another allocator or C library has no trim.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # the kernel's word for: set VmHWM to the present
    except OSError:
        return 0
    return _resident("VmRSS")


def _resident(name: str) -> int:
    if sys.platform != "linux":
        return 0
    lines = _STATUS.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
