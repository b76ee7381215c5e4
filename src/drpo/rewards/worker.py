"""What runs in a reward's process: it reads an item, scores it, answers, until nobody asks any more.

It trusts nothing that the reward may have left behind: what the reward printed went nowhere, what it forked is killed,
and the answer is one line of JSON, so that the asker need not unpickle anything that comes from here. The line carries
the seal of its item, which the reward does not receive: what a reward writes into the pipe itself is no answer.
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
"""Of an item: the number of bytes of the pickled (problem, text or transcript) that follows, and its seal."""


def pack(problem: Problem, answer: str | Transcript) -> bytes:
    """Return an item's body as it is sent, after a header."""
    return pickle.dumps((problem, answer))


def new_seal(number: int) -> str:
    """Return the seal of a process's item: its number, and 96 random bits that nobody can know before.

    Example:
        >>> len(new_seal(7)), new_seal(7)[:8]
        (32, '00000007')
    """
    return f"{number % 10**8:08d}{secrets.token_hex(12)}"


def unpack_answer(line: bytes, seal: str | None) -> Scored:
    """Return what an answer says.

    Args:
        line: as it was received.
        seal: of the item that it has to answer; None where nothing was asked.

    Raises:
        ValueError, KeyError, TypeError: it is none, or the answer to something else.
    """
    record = json.loads(line)
    if seal is None or record["seal"] != seal:
        raise ValueError("not the answer to this item")
    failure, result = record["failure"], record["result"]
    if result is not None:
        result = RewardResult.of_floats(result["total"], result["parts"], result["turns"])
    return Scored(result, None if failure is None else Failure(**failure), float(record["seconds"]))


def serve(items: "Connection[Any, Any]", answers: "Connection[Any, Any]", pickled: bytes, memory: int) -> None:
    """Say whether the reward could be imported, then score items until there are no more; does not return.

    Args:
        items: to read from.
        answers: to write lines to: first {"problem": why not, or null}, then a score for each item.
        pickled: the reward.
        memory: bytes of address space that it may take, beyond what it has when it is imported; 0 is no limit.
    """
    _detach(keep=(items.fileno(), answers.fileno()))
    if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:  # what the reward starts is its own affair
        del os.environ["PYTHONSAFEPATH"]
    reward, problem = _load(pickled)
    # A helper process that the reward's module starts is part of the reward; one that a call starts ends with the call.
    spared = processes.children()
    _limit_memory(memory)
    _write(answers.fileno(), {"problem": problem})
    if reward is not None:
        with open(items.fileno(), "rb", closefd=False) as stream:
            _answer(stream, answers.fileno(), _scorer(reward, os.getpid(), spared))
    os._exit(0)  # not by way of the reward's threads and exit handlers


def _answer(items: BinaryIO, answers: int, score: Callable[[bytes], Scored]) -> None:
    while header := items.read(HEADER.size):
        length, seal = HEADER.unpack(header)
        found = score(items.read(length))
        _write(answers, {"seal": seal.decode(), **asdict(found)})


def _scorer(reward: Reward, own: int, spared: frozenset[int]) -> Callable[[bytes], Scored]:
    def score(body: bytes) -> Scored:
        try:
            problem, answer = pickle.loads(body)
            found = call(reward, problem, answer)
        except BaseException as error:  # an item that cannot be read here; a KeyboardInterrupt of the reward's own
            found = Scored(None, Failure("raised", one_line(error)), 0.0)
        if os.getpid() != own:
            os._exit(0)  # a fork that came back from the call
        processes.end_children(spared)
        return found

    return score


def _detach(keep: tuple[int, ...]) -> None:
    """Leave the terminal and the process group, and let go of every open file but `keep`.

    What the reward prints goes nowhere, Ctrl-C does not reach it, and it holds nothing by which other processes of
    multiprocessing see that the trainer has ended.
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
    # The address space, not RLIMIT_DATA: that does not count shared mappings, of which mmap(-1, size) makes one. On top
    # of what there is, because libraries with GPU code reserve tens of GB that they never touch.
    if memory and sys.platform == "linux":
        limit = psutil.Process().memory_info().vms + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _write(to: int, record: dict[str, Any]) -> None:
    left = memoryview(json.dumps(record).encode() + b"\n")
    while left:
        left = left[os.write(to, left) :]
