"""Scoring of programs: run the model's Python against the problem's tests, in a sandbox."""

import json
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from drpo.errors import InputError
from drpo.rewards import sandboxed
from drpo.rewards.fences import program
from drpo.rewards.suites import Suite, longest, read_suite
from drpo.rewards.system_calls import filter_of
from drpo.types import Problem

_START_SECONDS = 60.0
_MORE = 1 << 16  # bytes of a line apart from its tests


@dataclass(frozen=True)
class PythonTests:
    r"""Score a program by the problem's tests that it passes.

    `drpo.rewards.fences.program` selects the fenced block of the text that is the program. The program runs in a new
    process. Asserting tests run one after the other in the program's namespace; for the other kinds its output, or the
    return value of its function, is compared. docs/rewards.md describes the sandbox and its guarantees.

    The tests are `problem.data[field]`, else `problem.answer`, in any of the formats in docs/rewards.md: programs with
    asserts, test functions or `unittest.TestCase`s, inputs and outputs, or JSON of these.

    Args:
        seconds: the wall-clock limit for program and tests together. It must be less than `RewardConfig.seconds`;
            otherwise endless loops count as failures of the reward, not as wrong answers.
        memory_mb: the limit on the address space, in MiB.
        file_mb: the limit on written data, in MiB: in total, or per file if `isolated` is off.
        partial: score the share of tests that pass; otherwise 1 if all pass, else 0.
        isolated: raise if the system offers no namespaces. Without namespaces the program can write to and delete the
            user's files and end the user's processes.
        field: the field of the problem's data that holds the tests.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> problem = Problem.of_text("0", "Write add(a, b).", "", data={"tests": ["assert add(1, 2) == 3"]})
        >>> PythonTests()(problem, "```python\ndef add(a, b):\n    return a + b\n```")
        1.0
    """

    seconds: float = 5.0
    memory_mb: int = 1024
    file_mb: int = 64
    partial: bool = False
    isolated: bool = True
    field: str = "tests"

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
        """Run the program in `text` against the tests.

        Args:
            problem: with tests.
            text: a completion.

        Returns:
            The score, in [0, 1]; 0 for a program that fails, hangs or crashes.

        Raises:
            InputError: the problem has no tests, they test nothing, or no sandbox is available.
            RuntimeError: the sandbox did not start.
        """
        suite = read_suite(problem, self.field)
        code = program(text, reads_input=suite.kind == "stdin", wanted=suite.wanted)
        passed = (
            self._asserted(suite, code, problem) if suite.kind == "asserts" else self._compared(suite, code, problem)
        )
        if suite.kind == "asserts" and any(passed) and _passes_by_itself(self, suite):
            raise InputError(f"problem {problem.id!r}: an empty program passes its tests, so they test nothing")
        return sum(passed) / len(suite) if self.partial else float(sum(passed) == len(suite))

    def _asserted(self, suite: Suite, code: str, problem: Problem | None = None) -> list[bool]:
        """Which tests pass; [] if no verdict arrives or it lacks the sandbox's token."""
        token = secrets.token_hex(16)
        imports = sorted({name for p in suite.programs for name in p.imports} - {"solution"})
        job = {"code": code, "tests": suite.jobs(), "token": token, "imports": imports}
        with _sandbox(self, "asserts", job, len(suite), _whose(problem)) as (lines, deadline):
            last = lines.next(deadline)
        passed = str(last.get("passed")) if last.get("token") == token else ""
        if sandboxed.SILENT in passed:
            which = passed.index(sandboxed.SILENT)
            raise InputError(f"{_whose(problem)}: test {which} came to its end without executing an assertion")
        return [verdict == sandboxed.PASSED for verdict in passed] if len(passed) == len(suite) else []

    def _compared(self, suite: Suite, code: str, problem: Problem) -> list[bool]:
        """Which tests have the right answer; stops at the first wrong one unless `partial`."""
        passed: list[bool] = []
        job = {"code": code, "tests": suite.jobs(), "entry": suite.entry}
        longest_answer = max(map(longest, suite.pairs), default=0)
        with _sandbox(self, suite.kind, job, 6 * longest_answer, _whose(problem)) as (lines, deadline):
            for pair in suite.pairs:
                answer = lines.next(deadline).get("answer")
                passed.append(isinstance(answer, str) and suite.accepts(answer, pair))
                if not (self.partial or passed[-1]):
                    break
        return passed


def output_of(code: str, limits: PythonTests, most: int, whose: str) -> str | None:
    """Run a program in the sandbox and return what it writes to its standard output.

    Args:
        code: the program.
        limits: of time, memory and files; the rest of it is not read.
        most: bytes of the output that are returned.
        whose: named in errors.

    Returns:
        The beginning of the output; None if the program ran out of time or memory, or ended with a status other than 0.

    Raises:
        InputError: no sandbox is available.
        RuntimeError: the sandbox did not start.
    """
    job = {"code": code, "tests": [{"input": "", "longest": most}], "entry": ""}
    with _sandbox(limits, "stdin", job, 6 * most, whose) as (lines, deadline):
        output: str | None = lines.next(deadline).get("answer")
    return output


@contextmanager
def _sandbox(
    limits: PythonTests, kind: str, job: dict[str, Any], longest_line: int, whose: str
) -> Iterator[tuple["_Lines", float]]:
    """Start a sandbox on a job and read its first line; yield the other lines and their deadline."""
    with tempfile.TemporaryDirectory(prefix="drpo-sandbox-", ignore_cleanup_errors=True) as folder:
        job |= {"kind": kind, "folder": folder, "cpu_seconds": int(limits.seconds) + 2}
        job |= {"memory_mb": limits.memory_mb, "file_mb": limits.file_mb, "isolated": limits.isolated}
        job |= {"filter": filter_of(platform.machine())}
        job |= {"parent": os.getpid()}  # the sandbox ends when this process does
        with _started(job, folder) as output:
            lines = _Lines(output, most=_MORE + longest_line)
            first = lines.next(time.monotonic() + _START_SECONDS)
            if "refused" in first:
                raise InputError(
                    f"python_tests: no sandbox here ({first['refused']}); see docs/rewards.md, "
                    "python_tests(isolated=False) does with less"
                )
            if "broken" in first:
                raise InputError(f"{whose}: its tests cannot be run: {first['broken']}")
            if "begun" not in first:
                raise RuntimeError("the sandbox did not start")
            yield lines, time.monotonic() + limits.seconds


@lru_cache(maxsize=4096)
def _passes_by_itself(reward: PythonTests, suite: Suite) -> bool:
    """Whether the tests pass with an empty program."""
    passed = reward._asserted(suite, "")
    return len(passed) == len(suite) and all(passed)


def _whose(problem: Problem | None) -> str:
    return "python_tests" if problem is None else f"problem {problem.id!r}"


@contextmanager
def _started(job: dict[str, Any], folder: str) -> Iterator[IO[bytes]]:
    """Start the sandbox on a job; kill all its processes at the end."""
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


class _Lines:
    """The records that a sandbox writes, one per line.

    Args:
        output: the pipe to read from.
        most: the limit on a line, in bytes.
    """

    def __init__(self, output: IO[bytes], most: int) -> None:
        self._output, self._most, self._received = output, most, b""
        self._poll = select.poll()
        self._poll.register(output, select.POLLIN)

    def next(self, deadline: float) -> dict[str, Any]:
        """Return the next line's record; empty if none arrives in time, or the line is not a record."""
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            piece = os.read(self._output.fileno(), 1 << 20) if self._poll.poll(1000 * left) else b""
            if not piece or len(self._received) > self._most:
                return {}
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        with suppress(ValueError):
            record = json.loads(line)
            return record if isinstance(record, dict) else {}
        return {}
