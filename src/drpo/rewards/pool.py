"""Rewards run in processes that can be killed, so that no text makes a run hang, die or learn from a NaN."""

import math
import multiprocessing
import numbers
import pickle
import signal
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from drpo.errors import InputError
from drpo.rewards.contract import Reward
from drpo.types import Problem

START_SECONDS = 120.0  # a worker imports torch and the reward's module, on a busy machine, from a cold disk
_LONGEST_FAILURE = 200
_REMEDY = "define it at the top level of a module, or declare it with drpo.rewards.in_process"


@dataclass(frozen=True)
class Mark:
    """What a reward made of one completion.

    Args:
        score: finite; None where the reward abstained or failed.
        failure: what went wrong, one line; None where nothing did. A failure is not a wrong answer.
        seconds: wall-clock time of the call; the deadline where it timed out, 0 where its process died.
    """

    score: float | None
    failure: str | None
    seconds: float


class RewardPool:
    """Marks completions with a reward, each under a deadline; use it in a `with` statement.

    The reward runs in child processes, so it may hang, crash or call `os._exit`, on the main thread or in C code, at
    the price of its own mark only. One that declares itself `in_process` is called in this process instead. Child
    processes import the reward by its module and name, and the main script too: a script that uses a pool needs
    `if __name__ == "__main__":`.

    Args:
        reward: called as `reward(problem, text)`; returns a finite number, or None to abstain.
        n_workers: child processes, >= 1.
        timeout: seconds that one call may take, > 0; enforced to 0.1 s.

    Raises:
        InputError: an argument out of range, or a reward that child processes cannot import.

    Example:
        >>> from drpo.rewards import exact_number
        >>> with RewardPool(exact_number) as pool:
        ...     [mark.score for mark in pool.score([(Problem("0", "1 + 1?", "2"), "It is 2.")])]
        [1.0]
    """

    def __init__(self, reward: Reward, n_workers: int = 1, timeout: float = 10.0) -> None:
        if n_workers < 1:
            raise InputError(f"n_workers={n_workers}: must be at least 1")
        if not 0 < timeout < math.inf:
            raise InputError(f"timeout={timeout}: must be finite and above 0")
        self._reward = reward
        self._n_workers = n_workers
        self._timeout = float(timeout)
        self._in_process = bool(getattr(reward, "in_process", False))
        self._pickled = b"" if self._in_process else _pickle(reward)
        self._pool: ProcessPool | None = None

    def __enter__(self) -> "RewardPool":
        """Start the processes and wait until one has imported the reward."""
        if not self._in_process:
            self._running()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes."""
        self._stop()

    def score(self, items: Sequence[tuple[Problem, str]]) -> list[Mark]:
        """Mark completions.

        Args:
            items: problems with the text of one completion each.

        Returns:
            One mark for each item, in order. A reward that raises, times out, dies or returns something else than a
            finite number or None gives a mark with a `failure`; it does not raise here.

        Raises:
            InputError: the processes died and could not be started again.
        """
        if self._in_process:
            return [_mark(self._reward, problem, text) for problem, text in items]
        marks: list[Mark] = []
        while len(marks) < len(items):
            marks += self._score_until_broken(items[len(marks) :])
        return marks

    def _score_until_broken(self, items: Sequence[tuple[Problem, str]]) -> list[Mark]:
        """Mark items up to and including the first that takes the whole pool with it, if one does."""
        # Items travel as bytes: one that cannot be unpickled then fails inside the call, not in pebble's queue.
        calls = [(self._pickled, _pack(item)) for item in items]
        pool = self._running()
        marks: list[Mark] = []
        try:
            futures = [pool.schedule(_mark_pickled, call, timeout=self._timeout) for call in calls]
            for future in futures:
                marks.append(self._wait(future))
        except RuntimeError:  # pebble's word for a pool that lost a process outside a call; BrokenProcessPool is one
            self._stop()
            marks.append(Mark(None, "the reward process died", 0.0))
        return marks

    def _wait(self, future: "ProcessFuture[Mark]") -> Mark:
        try:
            # Calls start in order, so one is over at most two deadlines after the one before it, plus a restart.
            return future.result(timeout=2 * self._timeout + START_SECONDS)
        except ProcessExpired as error:
            return Mark(None, f"the reward process died (exit status {error.exitcode})", 0.0)
        except TimeoutError:
            if not future.done():
                raise BrokenProcessPool from None
            return Mark(None, f"timed out after {self._timeout:g} s", self._timeout)

    def _running(self) -> ProcessPool:
        """The pool; started, or started again where all its processes died, and known to have imported the reward."""
        if self._pool is not None and self._pool.active:
            return self._pool
        self._stop()
        pool = ProcessPool(self._n_workers, initializer=_begin, initargs=(self._pickled,), context=self._context())
        self._pool = pool
        try:
            problem = pool.schedule(_cannot_load, (self._pickled,)).result(timeout=START_SECONDS)
        except (BrokenProcessPool, ProcessExpired):
            problem = 'it died while it started; a script that uses a pool needs `if __name__ == "__main__":`'
        except TimeoutError:
            problem = f"it had not started after {START_SECONDS:g} s"
        if problem:
            self._stop()
            raise InputError(f"reward {_name(self._reward)} cannot run in a child process: {problem}")
        return pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _context(self) -> Any:
        if "forkserver" not in multiprocessing.get_all_start_methods():
            return multiprocessing.get_context("spawn")
        context = multiprocessing.get_context("forkserver")
        # The server imports these once and every worker is a fork of it: a killed one is back in milliseconds. A user's
        # module is left to the worker, because an error in it would take the server down without a word.
        ours = getattr(self._reward, "__module__", None) or ""
        context.set_forkserver_preload(["__main__", __name__, *([ours] if ours.startswith("drpo.") else [])])
        return context


def _pickle(reward: Reward) -> bytes:
    try:
        return pickle.dumps(reward)
    except Exception as error:
        raise InputError(
            f"reward {_name(reward)} cannot be sent to a child process: {_one_line(error)}; {_REMEDY}"
        ) from None


def _pack(item: tuple[Problem, str]) -> bytes:
    try:
        return pickle.dumps(item)
    except Exception as error:
        raise InputError(f"problem {item[0].id!r} cannot be sent to the reward's process: {_one_line(error)}") from None


def _name(reward: Reward) -> str:
    module, name = getattr(reward, "__module__", None), getattr(reward, "__qualname__", None)
    return f"{module}:{name}" if module and name else repr(reward)


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # an error's own __str__ may fail
        text = type(error).__name__
    return text if len(text) <= _LONGEST_FAILURE else text[: _LONGEST_FAILURE - 3] + "..."


def _mark(reward: Reward, problem: Problem, text: str) -> Mark:
    start = time.perf_counter()
    try:
        score, failure = _score(reward(problem, text))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit too: whatever the reward does, it is the reward's failure
        score, failure = None, _one_line(error)
    return Mark(score, failure, time.perf_counter() - start)


def _score(value: object) -> tuple[float | None, str | None]:
    if value is None:
        return None, None
    if not isinstance(value, numbers.Real | np.bool_):
        return None, f"returned {repr(value)[:60]} ({type(value).__name__}), not a number"
    number = float(value)
    return (number, None) if math.isfinite(number) else (None, f"returned {number}")


# ---- what runs in the child processes ----


@lru_cache(maxsize=1)
def _load(pickled: bytes) -> Reward:
    return pickle.loads(pickled)  # type: ignore[no-any-return]


def _begin(pickled: bytes) -> None:
    """Import the reward before the first call, so that no deadline pays for it."""
    # pebble asks a process to end with SIGTERM and waits three seconds for its Python handler, which C code never lets
    # run, while its neighbours' clocks tick: die at once instead.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(BaseException):  # the first call meets it again and reports it
        _load(pickled)


def _cannot_load(pickled: bytes) -> str | None:
    try:
        _load(pickled)
    except BaseException as error:
        return f"{_one_line(error)}; {_REMEDY}"
    return None


def _mark_pickled(reward: bytes, item: bytes) -> Mark:
    problem, text = pickle.loads(item)
    return _mark(_load(reward), problem, text)
