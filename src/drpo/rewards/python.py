"""Marking of programs: the model's Python is run against the problem's tests, in a sandbox."""

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from drpo.errors import InputError
from drpo.rewards import sandboxed
from drpo.types import Problem

_BLOCK = re.compile(
    r"^[ \t]*```(?:python3?|py)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE | re.MULTILINE
)
_START_SECONDS = 60.0
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class PythonTests:
    r"""Mark a program by whether it passes the problem's tests.

    The program is the text's last ```python block, or the whole text where there is none. It runs in a process of its
    own, then the tests one after the other among the names that it has left: asserts, as a rule. What it runs in, and
    what that protects from, is written in docs/rewards.md.

    The tests are `problem.data["tests"]`, a program or a sequence of them, else `problem.answer`.

    Args:
        seconds: of wall-clock time for program and tests together; less than `Marking.seconds`, or endless loops are
            failures of the reward and not wrong answers.
        memory_mb: MiB of address space.
        file_mb: MiB that it may write in all; each file where `isolated` is off.
        partial: score the share of tests that pass; else 1 if all do, and 0.
        isolated: refuse to run where the system does not give it namespaces of its own: without them it can write to
            and delete the user's files and end the user's processes.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> problem = Problem("0", "Write add(a, b).", "", data={"tests": ["assert add(1, 2) == 3"]})
        >>> PythonTests()(problem, "```python\ndef add(a, b):\n    return a + b\n```")
        1.0
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    file_mb: int = 64
    partial: bool = False
    isolated: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise InputError(f"python_tests: seconds={self.seconds} must be in (0, 3600]")
        if self.memory_mb < 64:
            raise InputError(
                f"python_tests: memory_mb={self.memory_mb} must be at least 64, for the interpreter itself"
            )
        if self.file_mb < 1:
            raise InputError(f"python_tests: file_mb={self.file_mb} must be at least 1")

    def __call__(self, problem: Problem, text: str) -> float:
        """Run the program that stands in `text`.

        Args:
            problem: with tests.
            text: a completion.

        Returns:
            The score, in [0, 1]. A program that fails, hangs, dies or never ends scores 0.

        Raises:
            InputError: the problem has no tests or they are no Python, or there is no sandbox to be had.
            RuntimeError: the sandbox did not start.
        """
        tests = _tests(problem)
        passed = self._run(program(text), tests)
        return sum(passed) / len(tests) if self.partial else float(sum(passed) == len(tests))

    def _run(self, code: str, tests: Sequence[str]) -> Sequence[bool]:
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="drpo-sandbox-", ignore_cleanup_errors=True) as folder:
            job = {"folder": folder, "code": code, "tests": tests, "token": token, "cpu_seconds": int(self.seconds) + 2}
            job |= {"memory_mb": self.memory_mb, "file_mb": self.file_mb, "isolated": self.isolated}
            job |= {"parent": os.getpid()}  # with which it ends, however that ends
            with _started(job, folder) as output:
                first = _line(output, time.monotonic() + _START_SECONDS)
                if "refused" in first:
                    raise InputError(
                        f"python_tests: no sandbox here ({first['refused']}); see docs/rewards.md, "
                        "python_tests(isolated=False) does with less"
                    )
                if "begun" not in first:
                    raise RuntimeError("the sandbox did not start")
                last = _line(output, time.monotonic() + self.seconds)
        passed = last.get("passed")
        proven = last.get("token") == token and isinstance(passed, list) and len(passed) == len(tests)
        return [found is True for found in passed] if proven and passed else []


def program(text: str) -> str:
    r"""Return the text's last ```python block, cut short or not, or the whole text where there is none.

    Example:
        >>> program("First:\n```python\nx = 1\n```\nNo:\n```python\nx = 2\n```\n")
        'x = 2\n'
    """
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def _tests(problem: Problem) -> list[str]:
    found = problem.data.get("tests", problem.answer)
    tests = [found] if isinstance(found, str) else list(found) if isinstance(found, Sequence) else [found]
    for i, test in enumerate(tests):
        if not isinstance(test, str):
            raise InputError(f"problem {problem.id!r}: tests[{i}] is a {type(test).__name__}, not a program's text")
        try:
            compile(test, "test.py", "exec")
        except (SyntaxError, ValueError) as error:
            raise InputError(f"problem {problem.id!r}: tests[{i}] is not Python: {error}") from None
    if not any(test.strip() for test in tests):
        raise InputError(f"problem {problem.id!r}: python_tests needs tests, in data['tests'] or as the answer")
    return tests


@contextmanager
def _started(job: dict[str, Any], folder: str) -> Iterator[IO[bytes]]:
    """Start the sandbox on a job; whatever becomes of it, nothing of it is left afterwards."""
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(job).encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(Path(sandboxed.__file__))],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"HOME": folder, "TMPDIR": folder},
            cwd=folder,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout as output:
        try:
            yield output
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _line(output: IO[bytes], deadline: float) -> dict[str, Any]:
    """The next line's record; empty where none comes in time, or what comes is none."""
    received = b""
    poll = select.poll()
    poll.register(output, select.POLLIN)
    while not received.endswith(b"\n") and len(received) < _LONGEST_LINE:
        left = max(0.0, deadline - time.monotonic())
        piece = os.read(output.fileno(), 1) if poll.poll(1000 * left) else b""
        if not piece:
            return {}
        received += piece
    with suppress(ValueError):
        record = json.loads(received)
        return record if isinstance(record, dict) else {}
    return {}
