"""One training step while other programs keep some of the cores busy."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks.workers import drpo_step
from benchmarks.workers.protocol import Record, Repetition, serve

BUSY = "while True: pass"


@contextmanager
def neighbours(n: int) -> Iterator[None]:
    """Keep n programs busy, each with one thread, until the end of the block."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Assemble the run of `drpo_step`; a request has "neighbours" besides, how many other programs are busy."""
    about, step = drpo_step.prepare(setup)

    def repetition(request: Mapping[str, Any]) -> Record:
        with neighbours(request["neighbours"]):
            return step(request)

    return about, repetition


if __name__ == "__main__":
    serve(prepare)
