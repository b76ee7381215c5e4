"""A pool of worker processes that train the trials of a comparison in parallel."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import torch

from drpo.files import opened_here
from drpo.lab.trial_result import FAILED, STOPPED, write_trial_result
from drpo.model import loading

LOG = "log.txt"
_BYTES_PER_WEIGHT = 24  # float32 weight, gradient, two moments, the sampler's copy, and temporaries
_BYTES_BESIDES = 2 * 2**30  # libraries, activations, the head's chunks


@dataclass(frozen=True)
class PoolSize:
    """The number of workers, and the threads of each.

    Args:
        jobs: worker processes, >= 1.
        threads: torch threads of each worker; the last bits of numbers may depend on it.
    """

    jobs: int
    threads: int


def fitting(model: str, jobs: int | None, n_trials: int) -> PoolSize:
    """Return the number of workers that memory and cores allow, with the cores divided between them.

    OMP_NUM_THREADS, where it is set, is the number of threads of each worker.

    Args:
        model: the model of every trial.
        jobs: requested number of workers, or None for as many as fit.
        n_trials: an upper bound.
    """
    here = psutil.Process()
    cores = len(here.cpu_affinity()) if hasattr(here, "cpu_affinity") else os.cpu_count() or 1
    threads = _threads_of_environment()
    need = loading.n_parameters(model) * _BYTES_PER_WEIGHT + _BYTES_BESIDES
    if torch.cuda.is_available():
        free, most = torch.cuda.mem_get_info()[0], 8
    else:
        free, most = psutil.virtual_memory().available, max(1, cores // (threads or 1))
    at_once = max(1, min(jobs or most, n_trials, *([] if jobs else [free // need])))
    return PoolSize(at_once, threads or max(1, cores // at_once))


def _threads_of_environment() -> int | None:
    """Return the threads that OMP_NUM_THREADS asks for, at the outer level; None if it is unset or no number."""
    stated = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(stated) or None if stated.isdecimal() else None


class Worker:
    """A process that trains one trial after another. It is restarted if it dies.

    Args:
        threads: its torch threads.
        log: receives its output.
    """

    def __init__(self, threads: int, log: IO[str]) -> None:
        self._threads, self._log = threads, log
        self._process: subprocess.Popen[str] | None = None

    def train(self, folder: Path) -> str:
        """Train the trial of a folder; return its status."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return str(json.loads(answer)["status"])
        code = process.wait()
        self._process = None
        status = STOPPED if code in (130, -signal.SIGINT) else FAILED
        with suppress(OSError):  # a full disk: a trial without a result is taken up again
            write_trial_result(folder, {"status": status, "reason": f"its process ended with status {code}; see {LOG}"})
        return status

    def _start(self) -> subprocess.Popen[str]:
        threads = str(self._threads)
        return subprocess.Popen(
            [sys.executable, "-m", "drpo.lab.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches only this process, which forwards it
        )

    def interrupt(self) -> None:
        """Ask the process to finish its step and save."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill the process."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Close the process's input and wait for its end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


class WorkerPool:
    """Trains trials with several workers, each served by a thread of this process.

    Args:
        folders: of the trials, in the order of training.
        size: of the pool.
        log: receives the output of the workers.
    """

    def __init__(self, folders: Sequence[Path], size: PoolSize, log: Path) -> None:
        self._queue: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for folder in folders:
            self._queue.put(folder)
        self._log = open(log, "a", encoding="utf-8", opener=opened_here)  # noqa: SIM115 (until `close`)
        self._workers = [Worker(size.threads, self._log) for _ in range(size.jobs)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        self._stopping = False
        self._statuses: dict[Path, str] = {}
        for thread in self._threads:
            thread.start()

    @property
    def statuses(self) -> Mapping[Path, str]:
        """Status of each ended trial, and "running" for those in training."""
        return dict(self._statuses)

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`; return True once all work is done."""
        each = seconds / len(self._threads)
        for thread in self._threads:
            thread.join(each)
        return not any(thread.is_alive() for thread in self._threads)

    def interrupt(self) -> None:
        """Start no more trials; ask those in training to finish their step and save."""
        self._stopping = True
        for worker in self._workers:
            worker.interrupt()

    def kill(self) -> None:
        """Kill all workers; their trials can resume from their last checkpoints."""
        self._stopping = True
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """Wait for the trials in training and for the workers to end."""
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()
        self._log.close()

    def _serve(self, worker: Worker) -> None:
        while not self._stopping:
            try:
                folder = self._queue.get_nowait()
            except queue.Empty:
                return
            self._statuses[folder] = "running"
            self._statuses[folder] = worker.train(folder)
