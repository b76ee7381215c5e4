"""Runs rewards in child processes under deadlines, so no completion can hang or crash the run or give it a NaN."""

import json
import math
import multiprocessing
import os
import pickle
import select
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.util import Finalize
from typing import Any

from drpo.errors import InputError
from drpo.rewards import processes, worker
from drpo.rewards.contract import Reward, name_of, reads_transcript
from drpo.rewards.scoring import RewardConfig, Scored, call, one_line
from drpo.types import Failure, Problem, Transcript

START_SECONDS = 120.0  # a process imports torch and the reward's module, on a busy machine, from a cold disk
_LONGEST_ANSWER = 1 << 16
_LONGEST_WAIT = 86400.0  # seconds; poll counts milliseconds in 31 bits; the loop waits again
_REMEDY = "define it at the top level of a module, or declare it with drpo.rewards.in_process"
_NO_ANSWER = "the reward process sent an invalid answer"
_SCRIPT = 'a script that uses a pool needs `if __name__ == "__main__":`'


class RewardPool:
    """Scores completions with a reward, each under a deadline; use it in a `with` statement.

    The reward runs in child processes. If it hangs, crashes, forks or calls `os._exit`, only its own score is lost. A
    reward marked `in_process` is called in this process instead. Child processes import the reward by its module and
    name, and they import the main script too: a script that uses a pool needs `if __name__ == "__main__":`.

    Args:
        reward: called as `reward(problem, transcript)` or `reward(problem, text)` (see `reads_transcript`). It returns
            a finite number, a `RewardResult`, or None to abstain.
        config: processes, limits, and the handling of failures; None is `RewardConfig()`.

    Raises:
        InputError: a reward that child processes cannot import.

    Example:
        >>> from drpo.rewards import exact_number
        >>> with RewardPool(exact_number) as pool:
        ...     [scored.score for scored in pool.score([(Problem.of_text("0", "1 + 1?", "2"), "It is 2.")])]
        [1.0]
    """

    def __init__(self, reward: Reward, config: RewardConfig | None = None) -> None:
        self.config = config or RewardConfig()
        self._reward = reward
        self._in_process = bool(getattr(reward, "in_process", False))
        self._reads_transcript = reads_transcript(reward)
        self._pickled = b"" if self._in_process else _pickle(reward)
        self._workers: list[_Worker] = []
        # Without this, the interpreter would wait at exit for the processes of a pool that was never closed.
        Finalize(self, _end, args=(self._workers,), exitpriority=10)

    def __enter__(self) -> "RewardPool":
        """Start the processes and wait until one has imported the reward."""
        if not self._in_process:
            self._start()
            while not any(one.ready for one in self._workers):
                self._attend({})
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes."""
        _end(self._workers)

    def score(self, items: Sequence[tuple[Problem, str | Transcript]]) -> list[Scored]:
        """Score completions.

        Args:
            items: problems, each with a transcript or with a text that no model sampled.

        Returns:
            One `Scored` per item, in order. It has a `failure` if the reward raised, timed out, died or returned
            anything but a finite number, a `RewardResult` or None.

        Raises:
            InputError: a process died and could not be started again.
        """
        if self._in_process:
            return [call(self._reward, problem, self._read(problem, answer)) for problem, answer in items]
        waiting = deque((place, _pack(p, self._read(p, answer))) for place, (p, answer) in enumerate(items))
        scores: dict[int, Scored] = {}
        try:
            self._start()
            while len(scores) < len(items):
                self._hand_out(waiting)
                self._attend(scores)
        except BaseException:  # Ctrl-C too: an answer to this call must not reach the next one
            _end(self._workers)
            raise
        return [scores[place] for place in range(len(items))]

    def _read(self, problem: Problem, answer: str | Transcript) -> str | Transcript:
        """Return the text or the transcript, as the reward expects; nothing else is sent to its process."""
        if not self._reads_transcript:
            return answer.text if isinstance(answer, Transcript) else answer
        return answer if isinstance(answer, Transcript) else Transcript.of_text(problem, answer)

    def _start(self) -> None:
        """Start processes until there are `config.processes` of them."""
        while len(self._workers) < self.config.processes:
            self._workers.append(_Worker(self._reward, self._pickled, self.config))

    def _hand_out(self, waiting: deque[tuple[int, bytes]]) -> None:
        for one in self._workers:
            # A thread left by an earlier call may have killed the process since; such a process gets no item.
            if waiting and one.ready and one.place is None and one.process.is_alive():
                one.give(*waiting.popleft())

    def _attend(self, scores: dict[int, Scored]) -> None:
        """Wait for an event, then collect scores and replace lost processes."""
        _wait(self._workers)
        for one in list(self._workers):
            place = one.place
            try:
                scored = one.receive()
            except _LostError as lost:
                self._replace(one, lost.failure)
                scored = Scored(None, lost.failure, self.config.seconds if lost.failure.kind == "timed_out" else 0.0)
            else:
                if one.says_more:
                    self._replace(one, Failure("died", _NO_ANSWER))
            if scored is not None and place is not None:
                scores[place] = scored

    def _replace(self, lost: "_Worker", failure: Failure) -> None:
        self._workers.remove(lost)
        lost.end()
        if not lost.ready:
            raise InputError(f"reward {name_of(self._reward)} cannot run in a child process: {failure.text}")
        self._start()


class _LostError(Exception):
    """A process died, timed out or sent an invalid answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class _Worker:
    """The pool's handle on one reward process; no method blocks, except `end`.

    Args:
        reward: the reward.
        pickled: the reward, pickled.
        config: its limits.
    """

    def __init__(self, reward: Reward, pickled: bytes, config: RewardConfig) -> None:
        context = _context(reward)
        items, self.items = context.Pipe(duplex=False)
        self.answers, answers = context.Pipe(duplex=False)
        memory = int(config.memory_gb * 2**30)
        # Not a daemon: daemons may not have child processes.
        self.process = context.Process(target=worker.serve, args=(items, answers, pickled, memory), name="reward")
        self.process.start()
        for theirs, ours in ((items, self.items), (answers, self.answers)):
            theirs.close()
            os.set_blocking(ours.fileno(), False)
        self.ready = False
        self.place: int | None = None
        self._seal: str | None = None  # of the item in work
        self._given = 0
        self.unsent = memoryview(b"")
        self.deadline = time.perf_counter() + START_SECONDS
        self._received = b""
        self._seconds = config.seconds

    def give(self, place: int, item: bytes) -> None:
        """Send an item to score and start its deadline."""
        self.place, self._given = place, self._given + 1
        self._seal = worker.new_seal(self._given)
        self.unsent = memoryview(worker.HEADER.pack(len(item), self._seal.encode()) + item)
        self.deadline = time.perf_counter() + self._seconds

    @property
    def says_more(self) -> bool:
        """Whether unexpected output followed its last answer."""
        return self.place is None and bool(self._received)

    def receive(self) -> Scored | None:
        """Send and receive what is possible without blocking.

        Returns:
            A score, if a whole answer has arrived.

        Raises:
            _LostError: the process died, timed out or sent an invalid answer.
        """
        with suppress(BlockingIOError, BrokenPipeError):
            self.unsent = self.unsent[os.write(self.items.fileno(), self.unsent) :] if self.unsent else self.unsent
        chunk = None
        with suppress(BlockingIOError):
            chunk = os.read(self.answers.fileno(), _LONGEST_ANSWER)
        self._received += chunk or b""
        line, end, rest = self._received.partition(b"\n")
        if end:
            self._received = rest
            return self._read(line)
        if chunk == b"" or not self.process.is_alive():
            raise _LostError(self._death())
        if len(self._received) >= _LONGEST_ANSWER:
            raise _LostError(Failure("died", "the reward process sent too long an answer"))
        if time.perf_counter() >= self.deadline:
            late = f"timed out after {self._seconds:g} s" if self.ready else f"not started after {START_SECONDS:g} s"
            raise _LostError(Failure("timed_out", late))
        return None

    def _read(self, line: bytes) -> Scored | None:
        try:
            if self.ready:
                scored = worker.unpack_answer(line, self._seal)
                self.place, self._seal, self.deadline = None, None, math.inf
                return scored
            problem = json.loads(line)["problem"]
        except (ValueError, KeyError, TypeError):
            raise _LostError(Failure("died", _NO_ANSWER)) from None
        if problem is not None:
            raise _LostError(Failure("raised", f"{problem}; {_REMEDY}"))
        self.ready, self.deadline = True, math.inf
        return None

    def _death(self) -> Failure:
        self.process.join(1.0)
        status = self.process.exitcode
        end = "closed its pipe" if status is None else f"died (exit status {status})"
        return Failure("died", f"the reward process {end}" if self.ready else f"it {end} while it started; {_SCRIPT}")

    def end(self) -> None:
        """Kill the process and all its descendants."""
        processes.end_tree(self.process.pid or 0)
        self.process.join()
        self.process.close()
        self.items.close()
        self.answers.close()


def _wait(workers: Sequence[_Worker]) -> None:
    """Wait until a process has sent output, accepts more input, has died, or is past its deadline."""
    poll = select.poll()
    for one in workers:
        poll.register(one.answers.fileno(), select.POLLIN)
        poll.register(one.process.sentinel, select.POLLIN)
        if one.unsent:
            poll.register(one.items.fileno(), select.POLLOUT)
    left = min(one.deadline for one in workers) - time.perf_counter()
    poll.poll(None if left == math.inf else math.ceil(1000 * min(max(left, 0.0), _LONGEST_WAIT)))


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _context(reward: Reward) -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports these modules once and forks every process, so a killed process is replaced in milliseconds.
    # torch is among them because importing it would cost every process seconds. A user's module is not: an error in it
    # would silently end the server.
    ours = getattr(reward, "__module__", None) or ""
    context.set_forkserver_preload(
        ["__main__", worker.__name__, "torch", *([ours] if ours.startswith("drpo.") else [])]
    )
    return context


def _pickle(reward: Reward) -> bytes:
    try:
        return pickle.dumps(reward)
    except Exception as error:
        raise InputError(
            f"reward {name_of(reward)} cannot be sent to a child process: {one_line(error)}; {_REMEDY}"
        ) from None


def _pack(problem: Problem, answer: str | Transcript) -> bytes:
    try:
        return worker.pack(problem, answer)
    except Exception as error:
        raise InputError(f"problem {problem.id!r} cannot be sent to the reward's process: {one_line(error)}") from None
