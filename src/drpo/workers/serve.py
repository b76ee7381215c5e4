"""The main loop of a worker process: read a request, handle it, write the answer.

The loop does not trust the user's code that handles requests. Its output is discarded and its forks are killed. An
answer is one line of JSON, so the pool never unpickles data from this process. Each line carries the seal of its
request. The user's code does not receive the seal, so nothing that it writes into the pipe counts as an answer.
"""

import json
import os
import pickle
import resource
import secrets
import signal
import struct
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, Protocol

import psutil

from drpo.errors import describe
from drpo.spec import SAFE_PATH
from drpo.workers import processes

HEADER = struct.Struct("!Q?32s")
"""The header of a request: the size in bytes of its body, whether one more comes at once, and its seal."""


class Handler(Protocol):
    """Handles the requests of a worker process. It is pickled and sent there."""

    @property
    def keeps_processes(self) -> bool:
        """Whether processes that were started by requests so far go on; else they are killed after each request."""
        ...

    def handle(self, body: bytes) -> dict[str, Any]:
        """Return the answer to a request, as a record for JSON; raises nothing."""
        ...


def new_seal(number: int) -> str:
    """Return the seal of a request: its number and 96 random bits.

    Example:
        >>> len(new_seal(7)), new_seal(7)[:8]
        (32, '00000007')
    """
    return f"{number % 10**8:08d}{secrets.token_hex(12)}"


def unseal(line: bytes, seal: str | None) -> dict[str, Any]:
    """Parse an answer.

    Args:
        line: as it was received.
        seal: of the request; None if none was sent.

    Raises:
        ValueError, KeyError, TypeError: not an answer, or not to this request.
    """
    record: dict[str, Any] = json.loads(line.decode())
    if seal is None or record["seal"] != seal:
        raise ValueError("not the answer to this request")
    return record


def serve(requests: "Connection[Any, Any]", answers: "Connection[Any, Any]", pickled: bytes, memory: int) -> None:
    """Report whether the handler could be imported, then answer requests until the input ends; does not return.

    Args:
        requests: the pipe to read from.
        answers: the pipe to write lines to: first {"problem": the error, or null}, then an answer per request.
        pickled: the `Handler`.
        memory: bytes of address space that the process may allocate after the import; 0 is no limit.
    """
    _detach(keep=(requests.fileno(), answers.fileno()))
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:  # not for processes that the user's code starts
        del os.environ["PYTHONSAFEPATH"]
    handler, problem = _load(pickled)
    # Processes started by the import of the user's module stay; those started by a request end with it.
    spared = processes.children()
    _limit_memory(memory)
    _write(answers.fileno(), {"problem": problem})
    if handler is not None:
        with open(requests.fileno(), "rb", closefd=False) as stream:
            _answer(stream, answers.fileno(), handler, spared)
    os._exit(0)  # skips the threads and exit handlers of the user's code


def _answer(requests: BinaryIO, answers: int, handler: Handler, spared: frozenset[int]) -> None:
    pid = os.getpid()
    while given := list(_given(requests)):
        for seal, body in given:
            record = handler.handle(body)
            if os.getpid() != pid:
                os._exit(0)  # a fork that returned from the call
            if not handler.keeps_processes:
                processes.end_children(spared)
            _write(answers, {"seal": seal, **record})


def _given(requests: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield the seals and the bodies of the requests that were sent at once.

    All are read before the first is handled: the user's code must not find the seals of later ones in the pipe.
    """
    more = True
    while more and (header := requests.read(HEADER.size)):
        length, more, seal = HEADER.unpack(header)
        yield seal.decode(), requests.read(length)


def _detach(keep: tuple[int, ...]) -> None:
    """Leave the terminal and the process group, and close every open file but `keep`.

    The output of the user's code is discarded and Ctrl-C does not reach it. The process must not hold the descriptors
    by which other processes of multiprocessing notice that the trainer has ended.
    """
    os.setsid()
    processes.die_with_parent()
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in {0, 1, 2, *map(int, os.listdir("/dev/fd"))} - {nowhere, *keep}:
        os.dup2(nowhere, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load(pickled: bytes) -> tuple[Handler | None, str | None]:
    try:
        return pickle.loads(pickled), None
    except BaseException as error:
        return None, describe(error)


def _limit_memory(memory: int) -> None:
    # RLIMIT_AS, because RLIMIT_DATA does not count shared mappings such as mmap(-1, size). The limit is relative to the
    # present size, because libraries with GPU code reserve tens of GB that they never touch.
    if memory and sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _write(to: int, record: dict[str, Any]) -> None:
    left = memoryview(json.dumps(record).encode() + b"\n")
    while left:
        left = left[os.write(to, left) :]
