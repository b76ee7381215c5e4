"""Rewards that misbehave on command; a module of its own, because the pool's processes import it again and again."""

import itertools
import json
import mmap
import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from drpo.types import RewardResult, Transcript

VALUES = {
    "none": None,
    "nan": float("nan"),
    "inf": float("-inf"),
    "large": 1e39,
    "string": "yes",
    "list": [1.0],
    "too few": [],
    "array": np.array([1.0, 2.0]),
    "tensor": torch.tensor(1.0),
    "complex": 1j,
    "true": True,
    "int": 3,
    "float32": np.float32(0.5),
    "int64": np.int64(2),
    "bool_": np.bool_(True),
}


class Reader:
    """A reward of whole episodes that has much to say, of a second turn's four tokens too."""

    def __call__(self, problem, episode: "Transcript"):
        said = len(episode.messages[-1]["content"])
        parts = {"length": np.int64(episode.n_tokens), "cut": episode.finish_reason == "length", "said": said}
        return RewardResult(np.float32(episode.n_tokens), parts, (0, (0.5, 0, 0, np.float32(2))))


class Unspeakable(BaseException):
    """An error that neither prints nor travels between processes."""

    def __init__(self, a, b):
        super().__init__(a, b)

    def __str__(self):
        raise RuntimeError


def sleep():
    time.sleep(1000)


TRACE = []


def tell():
    for path in TRACE:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")


def forked():
    """Fork; true in the child, which tells its number, for which the parent waits."""
    told, tells = os.pipe()
    if os.fork():
        os.close(tells)
        os.read(told, 1)
        os.close(told)
        return False
    tell()
    os.close(told)
    os.close(tells)
    return True


def fork():
    """Both go on from here, and come back from the call."""
    forked()
    return 2.0


def fork_and_leave():
    """The child stays where it is."""
    if forked():
        sleep()
    return 2.0


def fork_a_daemon():
    """In a session of its own, and no longer a child: its parent is gone."""
    if forked():
        os.setsid()
        if forked():
            sleep()
        os._exit(0)
    time.sleep(0.1)
    return 2.0


def fork_and_hang():
    fork_a_daemon()
    sleep()


def fork_and_die():
    if forked():
        sleep()
    time.sleep(0.1)
    os._exit(3)


def tell_and_hang():
    tell()
    sleep()


def meet():
    """Wait until four calls have told that they are here."""
    tell()
    while Path(TRACE[0]).read_text().count("\n") < 4:
        time.sleep(0.02)
    return 2.0


def interrupt():
    raise KeyboardInterrupt


def hang_deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep()


def print_a_gigabyte():
    line = "x" * (1 << 20)
    for _ in range(512):
        print(line)
        os.write(2, line.encode())
    return 2.0


def talk_into_the_pipe():
    """Into every pipe that can be written to."""
    for descriptor in range(3, 64):
        with suppress(OSError):
            os.write(descriptor, b"1.0\n")
    sleep()


def answer(seal):
    """Into every pipe that can be written to, as the process itself would."""
    result = {"total": 100.0, "parts": {}, "turns": [], "weights": {}}
    scored = {"result": result, "failure": None, "seconds": 0.0, "usage": {}}
    line = json.dumps({**seal, "scores": [scored]}) + "\n"
    for descriptor in range(3, 64):
        with suppress(OSError):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.write(descriptor, line.encode())
    return 2.0


def answer_late():
    threading.Timer(0.1, answer, ({},)).start()
    return 2.0


DEEDS = {
    "answer for itself": lambda: answer({}),
    "answer with a seal": lambda: answer({"seal": "00000001" + "0" * 24}),
    "answer with none": lambda: answer({"seal": None}),
    "answer late": answer_late,
    "sys.exit": lambda: sys.exit(2),
    "interrupt": interrupt,
    "os._exit": lambda: os._exit(3),
    "abort": os.abort,
    "hang": sleep,
    "tell and hang": tell_and_hang,
    "meet": meet,
    "hang in C": lambda: all(itertools.repeat(True)),  # never comes back to where Python looks at signals
    "hang and ignore SIGTERM": hang_deaf,
    "fork": fork,
    "fork and leave": fork_and_leave,
    "fork a daemon": fork_a_daemon,
    "fork and hang": fork_and_hang,
    "fork and die": fork_and_die,
    "allocate": lambda: float(len(bytearray(50 << 30))),
    # Less than the machine may have, and never touched: only a limit of ours can refuse it.
    "allocate 6 GB": lambda: float(len(mmap.mmap(-1, 6 << 30, flags=mmap.MAP_PRIVATE))),
    "allocate shared": lambda: float(len(mmap.mmap(-1, 6 << 30))),
    "print": print_a_gigabyte,
    "close everything": lambda: (os.closerange(3, 1 << 16), sleep()),
    "talk into the pipe": talk_into_the_pipe,
}


def obey(problem, text):
    """Do what the text says: "deed", or "deed > path" where the numbers of forked processes are to go to a file."""
    text, _, trace = text.partition(" > ")
    TRACE[:] = [trace] if trace else []
    if text == "raise":
        raise ValueError("bad\n  news")
    if text == "unspeakable":
        raise Unspeakable(1, 2)
    if text == "die later":
        threading.Timer(0.2, os._exit, (5,)).start()
    if text in DEEDS:
        return DEEDS[text]()
    if text in VALUES:
        return VALUES[text]
    return float(text)


TURNS = (
    "raise",
    "hang in C",
    "os._exit",
    "fork",
    "fork and leave",
    "allocate",
    "print",
    "none",
    "nan",
    "string",
    "too few",
    "hang and ignore SIGTERM",
)


def in_turn(problem, text):
    """A misdeed for all but the first problem of each of four rollouts of four."""
    if problem.id.startswith("held-out"):
        return 0.0
    step, slot = map(int, problem.id.split("-"))
    return obey(problem, TURNS[3 * step + slot - 1] if slot else str(len(text) % 2))
