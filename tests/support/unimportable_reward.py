"""A reward whose module the test can import and a child process cannot."""

import multiprocessing

if multiprocessing.parent_process() is not None:
    raise RuntimeError("no licence found")


def reward(problem, text):
    return 1.0
