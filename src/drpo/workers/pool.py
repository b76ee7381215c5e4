"""A fixed number of worker processes; one that is lost is replaced."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from typing import Any, Generic, NamedTuple, TypeVar

from drpo.errors import InputError, describe
from drpo.types import Failure
from drpo.workers.process import REMEDY, LostError, Service, WorkerProcess, wait

T = TypeVar("T")


class Event(NamedTuple, Generic[T]):
    """The end of a request: an answer, or why there is none.

    Args:
        worker: number of the process that had the request.
        place: identifies the request.
        answer: as `Service.read` returned it.
        unbegun: the requests that the process was given after this one and has not begun, where it was lost.
    """

    worker: int
    place: int
    answer: T | Failure
    unbegun: tuple[int, ...] = ()


class ProcessPool(Generic[T]):
    """Worker processes of one service.

    Args:
        service: what they do.
        name: of the user's code that they run, for messages.
        n: number of processes.
    """

    def __init__(self, service: Service[T], name: str, n: int) -> None:
        self.workers: list[WorkerProcess[T]] = []
        self._service, self._name, self._n = service, name, n
        # Without this, the interpreter would wait at exit for the processes of a pool that was never closed.
        Finalize(self, _end, args=(self.workers,), exitpriority=10)

    def start(self) -> None:
        """Start the processes and wait until one has imported the user's code.

        Raises:
            InputError: it cannot be imported.
        """
        self._fill()
        while not any(one.ready for one in self.workers):
            self.attend()

    def end(self) -> None:
        """Kill the processes."""
        _end(self.workers)

    @contextmanager
    def requests(self) -> Iterator[None]:
        """Hold the processes ready inside; an error inside kills them.

        Ctrl-C too: an answer to a request of before must not reach a later one.
        """
        try:
            self._fill()
            yield
        except BaseException:
            self.end()
            raise

    def attend(self) -> list[Event[T]]:
        """Wait until something happens, replace the processes that were lost, and return the requests that ended.

        Raises:
            InputError: a process died and could not be started again.
        """
        events: list[Event[T]] = []
        for worker in wait(self.workers):
            number = self.workers.index(worker)
            try:
                for place, answer in worker.receive():
                    events.append(Event(number, place, answer))
            except LostError as lost:
                if worker.place is not None:
                    events.append(Event(number, worker.place, lost.failure, worker.waiting))
                self._replace(number, lost.failure)
            else:
                if worker.says_more:
                    self._replace(number, self._service.invalid)
        return events

    def _fill(self) -> None:
        while len(self.workers) < self._n:
            self.workers.append(WorkerProcess(self._service))

    def _replace(self, number: int, failure: Failure) -> None:
        lost = self.workers.pop(number)
        lost.end()
        if not lost.ready:
            raise InputError(f"{self._service.kind} {self._name} cannot run in a child process: {failure.text}")
        self.workers.insert(number, WorkerProcess(self._service))


def pickled(kind: str, name: str, handler: Any) -> bytes:
    """Return a handler, pickled.

    Raises:
        InputError: child processes could not import it.
    """
    try:
        return pickle.dumps(handler)
    except Exception as error:
        raise InputError(f"{kind} {name} cannot be sent to a child process: {describe(error)}; {REMEDY}") from None


def _end(workers: list[WorkerProcess[Any]]) -> None:
    while workers:
        workers.pop().end()
