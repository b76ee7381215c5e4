"""The handle on one worker process: sends requests and receives answers without blocking, and kills it."""

import json
import math
import multiprocessing
import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from drpo.types import Failure
from drpo.workers import processes, serve

START_SECONDS = 120.0  # a process imports torch and the user's module, on a busy machine, from a cold disk
REMEDY = "define it at the top level of a module, or declare it with drpo.rewards.in_process"
_LONGEST_WAIT = 86400.0  # seconds; poll counts milliseconds in 31 bits; the loop waits again
_CHUNK = 1 << 16
_PRELOADED = ["__main__", serve.__name__, "torch"]
_SCRIPT = 'a script that uses a pool needs `if __name__ == "__main__":`'

T = TypeVar("T")


@dataclass(frozen=True)
class Service(Generic[T]):
    """What worker processes do.

    Args:
        kind: what they run, for messages and process names: "reward".
        handler: the pickled `drpo.workers.serve.Handler`.
        read: converts the record of an answer; raises ValueError, KeyError or TypeError if it is none.
        longest: bytes of the longest answer.
        memory_gb: GiB of address space that a process may allocate after the import; 0 is no limit.
    """

    kind: str
    handler: bytes
    read: Callable[[dict[str, Any]], T]
    longest: int
    memory_gb: float

    @property
    def invalid(self) -> Failure:
        """The failure of a request whose process sent something that is no answer to it."""
        return Failure("died", f"the {self.kind} process sent an invalid answer")


class LostError(Exception):
    """A process died, timed out or sent an invalid answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class WorkerProcess(Generic[T]):
    """One worker process; no method blocks, except `end`.

    Args:
        service: what it does.
    """

    def __init__(self, service: Service[T]) -> None:
        context = _context()
        requests, self._requests = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        arguments = (requests, answers, service.handler, int(service.memory_gb * 2**30))
        # Not a daemon: daemons may not have child processes.
        self._process = context.Process(target=serve.serve, args=arguments, name=service.kind)
        self._process.start()
        for theirs, ours in ((requests, self._requests), (answers, self._answers)):
            theirs.close()
            os.set_blocking(ours.fileno(), False)
        self.ready = False
        self.place: int | None = None  # of the request in work
        self._service = service
        self._seal: str | None = None  # of the request in work
        self._given = 0
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._seconds = START_SECONDS
        self._deadline = time.perf_counter() + START_SECONDS

    @property
    def free(self) -> bool:
        """Whether it can be given a request.

        A thread left by an earlier request may have killed the process since; such a process gets none.
        """
        return self.ready and self.place is None and self._process.is_alive()

    def give(self, place: int, body: bytes, seconds: float) -> None:
        """Send a request and start its deadline.

        Args:
            place: identifies the request.
            body: as the service's handler reads it.
            seconds: until the answer must be there.
        """
        self.place, self._given = place, self._given + 1
        self._seal = serve.new_seal(self._given)
        self._unsent = memoryview(serve.HEADER.pack(len(body), self._seal.encode()) + body)
        self._seconds, self._deadline = seconds, time.perf_counter() + seconds

    @property
    def says_more(self) -> bool:
        """Whether unexpected output followed its last answer."""
        return self.place is None and bool(self._received)

    def receive(self) -> T | None:
        """Send and receive what is possible without blocking.

        Returns:
            An answer, if a whole one has arrived.

        Raises:
            LostError: the process died, timed out or sent an invalid answer.
        """
        with suppress(BlockingIOError, BrokenPipeError):
            if self._unsent:
                self._unsent = self._unsent[os.write(self._requests.fileno(), self._unsent) :]
        chunk, before = None, len(self._received)
        with suppress(BlockingIOError):
            chunk = os.read(self._answers.fileno(), _CHUNK)
        self._received += chunk or b""
        end = self._received.find(b"\n", before)
        if end >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            return self._read(line)
        if chunk == b"" or not self._process.is_alive():
            raise LostError(self._death())
        if len(self._received) >= self._service.longest:
            raise LostError(Failure("died", f"the {self._service.kind} process sent too long an answer"))
        if time.perf_counter() >= self._deadline:
            late = "timed out" if self.ready else "not started"
            raise LostError(Failure("timed_out", f"{late} after {self._seconds:g} s"))
        return None

    def _read(self, line: bytes) -> T | None:
        try:
            if self.ready:
                answer = self._service.read(serve.unseal(line, self._seal))
                self.place, self._seal, self._deadline = None, None, math.inf
                return answer
            problem = json.loads(line)["problem"]
        except (ValueError, KeyError, TypeError):
            raise LostError(self._service.invalid) from None
        if problem is not None:
            raise LostError(Failure("raised", f"{problem}; {REMEDY}"))
        self.ready, self._deadline = True, math.inf
        return None

    def _death(self) -> Failure:
        self._process.join(1.0)
        status = self._process.exitcode
        end = "closed its pipe" if status is None else f"died (exit status {status})"
        it = f"the {self._service.kind} process {end}" if self.ready else f"it {end} while it started; {_SCRIPT}"
        return Failure("died", it)

    def end(self) -> None:
        """Kill the process and all its descendants."""
        processes.end_tree(self._process.pid or 0)
        self._process.join()
        self._process.close()
        self._requests.close()
        self._answers.close()


def wait(workers: Sequence[WorkerProcess[Any]]) -> None:
    """Wait until a process has sent output, accepts more input, has died, or is past its deadline."""
    poll = select.poll()
    for one in workers:
        poll.register(one._answers.fileno(), select.POLLIN)
        poll.register(one._process.sentinel, select.POLLIN)
        if one._unsent:
            poll.register(one._requests.fileno(), select.POLLOUT)
    left = min(one._deadline for one in workers) - time.perf_counter()
    poll.poll(None if left == math.inf else math.ceil(1000 * min(max(left, 0.0), _LONGEST_WAIT)))


def preload(modules: Sequence[str]) -> None:
    """Have modules imported once, before any process is forked, as long as none was; importing them must not fail.

    So a killed process is replaced in milliseconds. torch is among them because importing it would cost every process
    seconds. A user's module is not: an error in it would silently end the server that forks.
    """
    _PRELOADED.extend(module for module in modules if module not in _PRELOADED)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
