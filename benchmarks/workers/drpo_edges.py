"""What stands around a training step: quick rewards, the report and the resuming of a long run, a small comparison."""

import hashlib
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.workers.large_run import make
from benchmarks.workers.marks import right, right_of_both
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve
from drpo.report.run_page import write_report
from drpo.rewards import RewardConfig, RewardPool
from drpo.train.callbacks import NullCallback
from drpo.train.config import load_run
from drpo.train.loop import train
from drpo.train.records import ROLLOUTS
from drpo.types import Problem

Work = Callable[[], Any]


class _Begun(NullCallback):
    """Notes when the first step begins."""

    def __init__(self) -> None:
        self.at = 0.0

    def phase(self, name: str) -> None:
        self.at = self.at or time.perf_counter()


def scored_by_pool(processes: int) -> Callable[[int], Record]:
    """Start a reward pool; return what scores so many texts with it."""
    pool = RewardPool(right, RewardConfig(processes=processes)).__enter__()
    return lambda n: _timed(lambda: pool.score(_items(n)))


def scored_one_by_one(processes: int) -> Callable[[int], Record]:
    """Start a pool of `multiprocessing`; return what scores so many texts with it, each in a task of its own."""
    pool = multiprocessing.get_context("spawn").Pool(processes)
    return lambda n: _timed(lambda: [score for score in pool.imap(right_of_both, _items(n))])


def _items(n: int) -> list[tuple[Problem, str]]:
    problems = [Problem.of_text(str(i), f"What is {i} + {i}?", str(2 * i)) for i in range(n // 8 or 1)]
    return [(problems[i % len(problems)], f"It is {i}.") for i in range(n)]


def reported(rollouts: int) -> Record:
    """Write the report of a run with so many rollouts."""
    return _with_run(rollouts, lambda folder: _timed(lambda: write_report(folder, load_run(folder))))


def parsed(rollouts: int) -> Record:
    """Parse the same records, a line at a time, and keep none."""
    return _with_run(rollouts, lambda folder: _timed(lambda: _parse(folder / ROLLOUTS)))


def _parse(path: Path) -> None:
    with path.open("rb") as lines:
        for line in lines:
            json.loads(line)


def resumed(rollouts: int) -> Record:
    """Go on with a run of so many rollouts; the seconds are those until its next step begins."""

    def resume(folder: Path) -> Record:
        begun, start = _Begun(), time.perf_counter()
        record = _timed(lambda: train(load_run(folder), folder, begun))
        return record | {"seconds": begun.at - start}

    return _with_run(rollouts, resume)


def hashed(rollouts: int) -> Record:
    """Hash the same records with SHA-256."""
    return _with_run(rollouts, lambda folder: _timed(lambda: _hash(folder / ROLLOUTS)))


def _hash(path: Path) -> None:
    with path.open("rb") as data:
        hashlib.file_digest(data, "sha256")


def compared(trials: int) -> Record:
    """Compare objectives over so many trials, half of them with another seed, in one worker, as the command."""
    objectives, seeds = ["drpo(0.2)", "ppo(0.2, 0.28)"][: trials or 1], [str(s) for s in range(-(-trials // 2))]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "drpo", "compare", "smoke", "--objectives", *objectives, "--seeds", *seeds]
        command += ["--jobs", "1", "--plain", "--out", folder]
        before = _children()
        record = _timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        return record | {"cpu_seconds": _children() - before}


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _with_run(rollouts: int, measure: Callable[[Path], Record]) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), rollouts)
        return measure(Path(folder))


def _timed(work: Work) -> Record:
    meter, begun = Meter(), time.process_time()
    meter.start()
    work()
    return {**meter.stop(), "cpu_seconds": time.process_time() - begun}


ONCE: Mapping[str, Callable[[int], Record]] = {
    "report": reported,
    "json": parsed,
    "resume": resumed,
    "sha256": hashed,
    "compare": compared,
}
SCORED: Mapping[str, Callable[[int], Callable[[int], Record]]] = {
    "reward pool": scored_by_pool,
    "multiprocessing": scored_one_by_one,
}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """Get ready to do what a setup names in "what"; a request says how many in "n"."""
    what = setup["what"]
    work = SCORED[what](setup["processes"]) if what in SCORED else ONCE[what]
    return {"settings": f"{what}, everything else the default"}, lambda request: work(request["n"])


if __name__ == "__main__":
    serve(prepare)
