"""The main loop of a reward process: read an item, score it, write the answer.

The loop does not trust the reward. The reward's output is discarded and its forks are killed. The answer is one line of
JSON, so the pool never unpickles data from this process. Each line carries the seal of its item. The reward does not
receive the seal, so nothing that it writes into the pipe counts as an answer.
"""

import json
import os
import pickle
import resource
import secrets
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

import psutil

from drpo.rewards import processes
from drpo.rewards.contract import Reward
from drpo.rewards.scoring import Scored, call, one_line
from drpo.spec import SAFE_PATH
from drpo.types import Failure, Problem, RewardResult, Transcript

HEADER = struct.Struct("!Q32s")
"""The header of an item: the size in bytes of the pickled (problem, text or transcript), and the item's seal."""


def pack(problem: Problem, answer: str | Transcript) -> bytes:
    """Return an item's body, which is sent after its header."""
    return pickle.dumps((problem, answer))


def new_seal(number: int) -> str:
    """Return the seal of an item: its number and 96 random bits.

    Example:
        >>> len(new_seal(7)), new_seal(7)[:8]
        (32, '00000007')
    """
    return f"{number % 10**8:08d}{secrets.token_hex(12)}"


def unpack_answer(line: bytes, seal: str | None) -> Scored:
    """Parse an answer.

    Args:
        line: as it was received.
        seal: of the item; None if no item was sent.

    Raises:
        ValueError, KeyError, TypeError: not an answer, or not to this item.
    """
    record = json.loads(line)
    if seal is None or record["seal"] != seal:
        raise ValueError("not the answer to this item")
    failure, result = record["failure"], record["result"]
    if result is not None:
        result = RewardResult.of_floats(result["total"], result["parts"], result["turns"])
    return Scored(result, None if failure is None else Failure(**failure), float(record["seconds"]))


def serve(items: "Connection[Any, Any]", answers: "Connection[Any, Any]", pickled: bytes, memory: int) -> None:
    """Report whether the reward could be imported, then score items until the input ends; does not return.

    Args:
        items: the pipe to read from.
        answers: the pipe to write lines to: first {"problem": the error, or null}, then a score per item.
        pickled: the reward.
        memory: bytes of address space that the process may allocate after the import; 0 is no limit.
    """
    _detach(keep=(items.fileno(), answers.fileno()))
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:  # not for processes that the reward starts
        del os.environ["PYTHONSAFEPATH"]
    reward, problem = _load(pickled)
    # Processes started by the import of the reward's module stay; those started by a call end with the call.
    spared = processes.children()
    _limit_memory(memory)
    _write(answers.fileno(), {"problem": problem})
    if reward is not None:
        with open(items.fileno(), "rb", closefd=False) as stream:
            _answer(stream, answers.fileno(), _scorer(reward, os.getpid(), spared))
    os._exit(0)  # skips the reward's threads and exit handlers


def _answer(items: BinaryIO, answers: int, score: Callable[[bytes], Scored]) -> None:
    while header := items.read(HEADER.size):
        length, seal = HEADER.unpack(header)
        scored = score(items.read(length))
        _write(answers, {"seal": seal.decode(), **asdict(scored)})


def _scorer(reward: Reward, pid: int, spared: frozenset[int]) -> Callable[[bytes], Scored]:
    def score(body: bytes) -> Scored:
        try:
            problem, answer = pickle.loads(body)
            scored = call(reward, problem, answer)
        except BaseException as error:  # an unreadable item, or a KeyboardInterrupt that the reward raised
            scored = Scored(None, Failure("raised", one_line(error)), 0.0)
        if os.getpid() != pid:
            os._exit(0)  # a fork that returned from the call
        processes.end_children(spared)
        return scored

    return score


def _detach(keep: tuple[int, ...]) -> None:
    """Leave the terminal and the process group, and close every open file but `keep`.

    The reward's output is discarded and Ctrl-C does not reach it. The process must not hold the descriptors by which
    other processes of multiprocessing notice that the trainer has ended.
    """
    os.setsid()
    processes.die_with_parent()
    processes.adopt_orphans()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in {0, 1, 2, *map(int, os.listdir("/dev/fd"))} - {nowhere, *keep}:
        os.dup2(nowhere, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load(pickled: bytes) -> tuple[Reward | None, str | None]:
    try:
        return pickle.loads(pickled), None
    except BaseException as error:
        return None, one_line(error)


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
