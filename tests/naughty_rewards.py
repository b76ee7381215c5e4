"""Rewards that misbehave on command; a module of its own, because the pool's processes import it again and again."""

import itertools
import os
import sys
import threading
import time

import numpy as np

VALUES = {
    "none": None,
    "nan": float("nan"),
    "inf": float("-inf"),
    "string": "yes",
    "list": [1.0],
    "complex": 1j,
    "true": True,
    "int": 3,
    "float32": np.float32(0.5),
    "int64": np.int64(2),
    "bool_": np.bool_(True),
}


class Unspeakable(BaseException):
    """An error that neither prints nor travels between processes."""

    def __init__(self, a, b):
        super().__init__(a, b)

    def __str__(self):
        raise RuntimeError


def obey(problem, text):
    """Do what the text says."""
    if text == "raise":
        raise ValueError("bad\n  news")
    if text == "unspeakable":
        raise Unspeakable(1, 2)
    if text == "sys.exit":
        sys.exit(2)
    if text == "os._exit":
        os._exit(3)
    if text == "abort":
        os.abort()
    if text == "hang":
        time.sleep(1000)
    if text == "hang in C":
        all(itertools.repeat(True))  # never comes back to where Python looks at signals
    if text == "die later":
        threading.Timer(0.2, os._exit, (5,)).start()
    if text in VALUES:
        return VALUES[text]
    return float(text)
