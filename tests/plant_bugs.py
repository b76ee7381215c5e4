"""Plant each known bug in a process of its own while the program runs, and demand that the tests named for it fail.

    python tests/plant_bugs.py [--named TEXT ...] [--workers 2]

Exit status 1 where a bug survives or cannot be planted, or a named test fails where none is planted. The bugs are
records in `tests/planted`; to add one, add a record. Processes are forks of this one, in which the libraries are
imported already and `drpo` is not.
"""

import argparse
import importlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from planted import Replacement, all_replacements, plant_when_imported

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300.0
FOLDERS = ("src", "studies", "tests", "tests/planting")
LIBRARIES = (
    "hypothesis",
    "math_verify",
    "peft",
    "plotly.graph_objects",
    "safetensors.torch",
    "scipy.stats",
    "torch.distributed.fsdp",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "tyro",
)


@dataclass(frozen=True)
class Trial:
    """Tests to be run, with a bug planted or without.

    Args:
        tests: pytest node ids.
        bug: planted, or None.
    """

    tests: tuple[str, ...]
    bug: Replacement | None = None

    @property
    def name(self) -> str:
        return self.bug.name if self.bug else f"no bug, {self.tests[0].partition('::')[0]}"


class Running:
    """A trial under way, in a fork of this process."""

    def __init__(self, trial: Trial, out: Path) -> None:
        self.trial, self.out, self.start = trial, out, time.perf_counter()
        self.seconds, self.status = 0.0, 0
        self.pid = os.fork()  # not of multiprocessing, whose children know that they are some
        if self.pid == 0:
            run_tests(trial, out)

    def over(self) -> bool:
        """Whether it has ended; a test that never ends is killed, which is no pass."""
        self.seconds = time.perf_counter() - self.start
        if self.seconds > LIMIT_S:
            os.killpg(self.pid, signal.SIGKILL)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.status = os.waitstatus_to_exitcode(status)
        return pid != 0

    def verdict(self) -> str:
        """What became of it: "caught", "sound", why it could not be judged, or what is wrong."""
        return judged(self.trial, self.status, self.out.read_text(errors="replace"))


def run_tests(trial: Trial, out: Path) -> None:
    """Be the process of a trial, to its end."""
    os.setpgid(0, 0)
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    paths = [str(ROOT / folder) for folder in FOLDERS]
    sys.path[:0] = paths
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("DRPO_SHARED", str(ROOT.parent / "shared"))
    if trial.bug:
        os.environ["DRPO_PLANTED"] = trial.bug.name
        plant_when_imported(trial.bug.name)
    options = ["-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts=", "--disable-warnings"]
    first = ["-x"] if len(trial.tests) == 1 else []
    status = 2
    try:
        status = pytest.main([*options, *first, "--hypothesis-profile=no_shrinking", *trial.tests])
        sys.stdout.flush()
    finally:
        os._exit(status)


def judged(trial: Trial, status: int, said: str) -> str:
    """What the end of a trial's process says of it; a negative status is the signal that ended it."""
    if status < 0 and trial.bug:
        return "caught"
    if status not in (0, 1):  # neither passed nor failed: nothing was collected, or it could not be imported
        return f"pytest could not run (status {status}):\n{said[-1500:]}"
    if trial.bug is None:
        return "sound" if status == 0 else f"FAILED where no bug is planted:\n{said[-3000:]}"
    if " skipped" in said and " passed" not in said and " failed" not in said:
        return "not judged: its tests are skipped here"
    failed = re.findall(r"^FAILED (\S+?::.*?)(?: - .*)?$", said, flags=re.MULTILINE)
    passed = [test for test in trial.tests if not any(is_case_of(node, test) for node in failed)]
    return f"SURVIVED {', '.join(passed)}\n{said[-1500:]}" if passed else "caught"


def is_case_of(node: str, test: str) -> bool:
    """True where `node` is the test, or one of its parametrised cases."""
    return node == test or node.startswith(f"{test}[")


def trials(bugs: Iterable[Replacement]) -> list[Trial]:
    """One for each bug, and one without a bug for the named tests of each file."""
    bugs = sorted(bugs, key=lambda bug: bug.tests)
    of_file: dict[str, dict[str, None]] = {}
    for test in (test for bug in bugs for test in bug.tests):
        of_file.setdefault(test.partition("::")[0], {})[test] = None
    return [*(Trial(tuple(tests)) for tests in of_file.values()), *(Trial(bug.tests, bug) for bug in bugs)]


def run_all(todo: Iterable[Trial], workers: int, folder: Path) -> Iterator[Running]:
    """Run trials, so many at a time, and yield each when it has ended."""
    running: list[Running] = []
    left = enumerate(todo)
    while True:
        while len(running) < workers and (item := next(left, None)):
            number, trial = item
            running.append(Running(trial, folder / f"{number}.txt"))
        if not running:
            return
        ended = [one for one in running if one.over()]
        running = [one for one in running if one not in ended]
        yield from ended
        time.sleep(0 if ended else 0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--named", nargs="+", metavar="TEXT", help="only those with one of these in their name")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes at a time")
    options = parser.parse_args()
    bugs = [b for b in all_replacements().values() if any(text in b.name for text in options.named or [""])]
    if not bugs:
        parser.error("no such bug")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for library in LIBRARIES:
        importlib.import_module(library)
    good = True
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        for one in run_all(trials(bugs), options.workers, Path(folder)):
            verdict = one.verdict()
            print(f"{one.seconds:5.1f} s  {one.trial.name}: {verdict}", flush=True)
            good &= verdict in ("caught", "sound") or verdict.startswith("not judged")
    print(f"{len(bugs)} bugs planted; {'none survived' if good else 'see above'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
