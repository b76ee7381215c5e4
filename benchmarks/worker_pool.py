"""Workers as processes: started when first needed, kept while they are needed, asked one thing at a time."""

import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.cases import Worker

ROOT = Path(__file__).resolve().parents[1]
ANSWER_SECONDS = 1800.0
"""A worker that has not answered by then is killed, and stands in the table as failed."""


class WorkerError(Exception):
    """A worker cannot be started, has died, or answered that it failed; the message is one line for the table."""


def plain(text: str) -> str:
    """Return a message without addresses and without folders, which say something of the machine and nothing else.

    Args:
        text: one line or more.

    Example:
        >>> plain("cannot open /home/me/x/model.bin at https://example.org/a")
        'cannot open model.bin at <address>'
    """
    text = re.sub(r"\w+://[^\s'\"]+", "<address>", text)
    text = re.sub(r"(?<![\w.])/[^\s'\",:;)]*?([^\s/'\",:;)]+)(?=[\s'\",:;)]|$)", r"\1", text)
    return " ".join(text.split())[:300]


def environment_variables(threads: int) -> dict[str, str]:
    """Return what every worker runs under: equal threads, which go to sleep soon when they have nothing to do.

    Args:
        threads: for torch, OpenMP and MKL.

    Returns:
        The whole environment of a worker.
    """
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # A worker that waits for its turn must leave the cores to the one whose turn it is. The spin count overrides
        # the policy in libgomp: asleep at once is slower for all of them.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "3000",
        "KMP_BLOCKTIME": "5",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    }
    return {**os.environ, **ours}


class Process:
    """One running worker.

    Args:
        python: of its environment.
        worker: what to run.
        threads: for each worker alike.
        seconds_left: how long an answer may take from now on; a worker that takes longer is killed.

    Raises:
        WorkerError: it did not come up.
    """

    def __init__(self, python: Path, worker: Worker, threads: int, seconds_left: Callable[[], float]) -> None:
        self._seconds_left, self._late = seconds_left, False
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (lives as long)
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.workers.{worker.module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment_variables(threads),
        )
        try:
            self.about: dict[str, Any] = self.ask(worker.setup)["about"]
        except WorkerError:
            self.close()
            raise

    def ask(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Send an object and return the answer.

        Raises:
            WorkerError: it failed, died or took too long; a worker that failed may be asked again.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        seconds = max(0.0, self._seconds_left())
        deadline = threading.Timer(seconds, self._end)
        deadline.start()
        try:
            self._process.stdin.write(json.dumps(record) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            deadline.cancel()
        if self._late:
            raise WorkerError(f"did not answer within the {seconds:.0f} s that were left; ended")
        if not line:
            raise WorkerError(f"ended with status {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "failure" in answer:
            raise WorkerError(plain(answer["failure"]))
        return answer

    def close(self) -> None:
        """Close the line, on which a worker ends by itself; kill it where it does not."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _end(self) -> None:
        self._late = True
        self._process.kill()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        return plain(lines[-1]) if lines else "it said nothing"


class WorkerPool:
    """The workers of the cases at hand; use it in a `with` statement.

    Args:
        pythons: environment -> its python, or why there is none.
        threads: for each worker.
        seconds_left: how long an answer may take from now on.
    """

    def __init__(
        self,
        pythons: Mapping[str, Path | str],
        threads: int,
        seconds_left: Callable[[], float] = lambda: ANSWER_SECONDS,
    ) -> None:
        self._pythons, self._threads, self._seconds_left = pythons, threads, seconds_left
        self._running: dict[str, Process] = {}
        self._failed: dict[str, str] = {}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(())

    def get(self, worker: Worker) -> Process:
        """Return the running worker, started where it is not.

        Raises:
            WorkerError: there is no environment for it, or it did not come up; it is not tried twice.
        """
        key, python = _key(worker), self._pythons[worker.environment]
        if key in self._failed:
            raise WorkerError(self._failed[key])
        if isinstance(python, str):
            raise WorkerError(python)
        if self._seconds_left() <= 0:
            raise WorkerError("no time was left for it")
        if key not in self._running:
            try:
                self._running[key] = Process(python, worker, self._threads, self._seconds_left)
            except WorkerError as error:
                self._failed[key] = str(error)
                raise
        return self._running[key]

    def discard(self, worker: Worker) -> None:
        """End a worker, whose process may be broken; the next case begins another."""
        process = self._running.pop(_key(worker), None)
        if process is not None:
            process.close()

    def keep(self, workers: Iterable[Worker]) -> None:
        """End all workers but these."""
        wanted = {_key(w) for w in workers}
        for key in [k for k in self._running if k not in wanted]:
            self._running.pop(key).close()


def _key(worker: Worker) -> str:
    return json.dumps([worker.environment, worker.module, worker.setup], sort_keys=True)
