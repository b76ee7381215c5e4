"""The process that trains trials, as a fork: it imports nothing, so that a test of it takes no seconds to start."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

from drpo.lab import worker


class ForkedPopen:
    """What `lab.worker_pool` uses of `subprocess.Popen`, for one worker at a time.

    A second worker would hold the first's pipes open.

    Args:
        command: that a process of its own would run; the last word is the worker's argument.
        stderr: takes what it prints.
        options: of `subprocess.Popen`; all else is as `lab.worker_pool` asks for it.
    """

    def __init__(self, command: Sequence[str], *, stderr: IO[str], **options: Any) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._requests)
            os.close(self._answers)
            _work(command[-1], requests, answers, stderr.fileno())
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(self._requests, "w"), os.fdopen(self._answers)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _work(parent: str, requests: int, answers: int, log: int) -> None:
    """Be the worker, and end without what a test's process does at its end."""
    status = 1
    try:
        os.setsid()
        for ours, standard in ((requests, 0), (answers, 1), (log, 2)):
            os.dup2(ours, standard)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["worker", parent]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        worker.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


class ForkingSubprocess:
    """The module `subprocess` as `lab.worker_pool` uses it, with forks for processes."""

    Popen = ForkedPopen
    PIPE = subprocess.PIPE
