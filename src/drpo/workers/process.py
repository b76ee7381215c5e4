"""The handle on one worker process: sends requests and receives answers without blocking, and kills it."""

import json
import math
import multiprocessing
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from drpo.types import Failure
from drpo.workers import processes, serve

START_SECONDS = 120.0  # a process imports torch and the user's module, on a busy machine, from a cold disk
REMEDY = "define it at the top level of a module, or declare it with drpo.rewards.in_process"
_LONGEST_WAIT = 86400.0  # seconds; poll counts milliseconds in 31 bits; the loop waits again
_CHUNK = 1 << 16
_PRELOADED = ["__main__", serve.__name__]
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
        self._service = service
        self._in_work: deque[tuple[int, str]] = deque()  # place and seal of each request without an answer, in order
        self._given = 0
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._seconds = START_SECONDS
        self._deadline = time.perf_counter() + START_SECONDS

    @property
    def place(self) -> int | None:
        """Identifies the request in work; None without one."""
        return self._in_work[0][0] if self._in_work else None

    @property
    def waiting(self) -> tuple[int, ...]:
        """The places of the requests that come after the one in work."""
        return tuple(place for place, _ in self._in_work)[1:]

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
        self.give_all([(place, body)], seconds)

    def give_all(self, requests: Sequence[tuple[int, bytes]], seconds: float) -> None:
        """Send requests, at least one, which are handled one after the other, and start the deadline of the first.

        Args:
            requests: place and body of each; see `give`.
            seconds: until an answer must be there, after the one before.
        """
        sent = []
        for left, (place, body) in zip(reversed(range(len(requests))), requests, strict=True):
            self._given += 1
            seal = serve.new_seal(self._given)
            self._in_work.append((place, seal))
            sent += [serve.HEADER.pack(len(body), left > 0, seal.encode()), body]
        self._unsent = memoryview(b"".join(sent))
        self._seconds, self._deadline = seconds, time.perf_counter() + seconds

    @property
    def says_more(self) -> bool:
        """Whether unexpected output followed its last answer."""
        return self.place is None and bool(self._received)

    def receive(self) -> Iterator[tuple[int, T]]:
        """Send and receive what is possible without blocking.

        Yields:
            The place and the answer of each request whose answer has arrived.

        Raises:
            LostError: the process died, timed out or sent an invalid answer to the request in work.
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
            while end >= 0:
                line = bytes(self._received[:end])
                del self._received[: end + 1]
                yield from self._read(line)
                end = -1 if self.place is None else self._received.find(b"\n")
            return
        if chunk == b"" or not self._process.is_alive():
            raise LostError(self._death())
        if len(self._received) >= self._service.longest:
            raise LostError(Failure("died", f"the {self._service.kind} process sent too long an answer"))
        if time.perf_counter() >= self._deadline:
            late = "timed out" if self.ready else "not started"
            raise LostError(Failure("timed_out", f"{late} after {self._seconds:g} s"))

    def _read(self, line: bytes) -> Iterator[tuple[int, T]]:
        try:
            if self.ready:
                place, seal = self._in_work[0] if self._in_work else (-1, None)
                answer = self._service.read(serve.unseal(line, seal))
                self._in_work.popleft()
                self._deadline = time.perf_counter() + self._seconds if self._in_work else math.inf
                yield place, answer
                return
            problem = json.loads(line)["problem"]
        except (ValueError, KeyError, TypeError):
            raise LostError(self._service.invalid) from None
        if problem is not None:
            raise LostError(Failure("raised", f"{problem}; {REMEDY}"))
        self.ready, self._deadline = True, math.inf

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


def wait(workers: Sequence[WorkerProcess[T]]) -> list[WorkerProcess[T]]:
    """Wait until a process has sent output, accepts more input, has died, or is past its deadline; return such."""
    poll, files = select.poll(), {}
    for one in workers:
        waited_for = [(one._answers.fileno(), select.POLLIN), (one._process.sentinel, select.POLLIN)]
        if one._unsent:
            waited_for.append((one._requests.fileno(), select.POLLOUT))
        for file, event in waited_for:
            poll.register(file, event)
            files[file] = one
    left = min(one._deadline for one in workers) - time.perf_counter()
    ready = poll.poll(None if left == math.inf else math.ceil(1000 * min(max(left, 0.0), _LONGEST_WAIT)))
    now, active = time.perf_counter(), {id(files[file]) for file, _ in ready}
    return [one for one in workers if id(one) in active or now >= one._deadline]


def preload(modules: Sequence[str], code: str) -> None:
    """Have modules imported once, before any process is forked, as long as none was; importing them must not fail.

    So a killed process is replaced in milliseconds. Code of the user may import torch, which would cost every process
    seconds, so it is among them. The user's module is not: an error in it would silently end the server that forks.

    Args:
        modules: of the package.
        code: the module of what the processes run; one of the package is imported too.
    """
    known = code if code.startswith("drpo.") else "torch"
    _PRELOADED.extend(module for module in (*modules, known) if module not in _PRELOADED)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
