"""Plant each known bug, in a copy of the source or while the program runs, and demand that the tests named for it fail.

    python tests/plant_bugs.py [--only NUMBER ...] [--named TEXT ...] [--workers 2]

Exit status 1 where a bug survives, a patch no longer applies, or a named test fails on the source as it is. The bugs
are records in `tests/planted`; to add one, add a record.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from planted import Bug, Replacement, all_bugs, all_replacements

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300.0
COPIED = ("src", "studies", "tests", "conftest.py", "pyproject.toml")


class Verdict(NamedTuple):
    """What became of a bug: `text` is "caught", why it could not be judged, or what is wrong."""

    text: str
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.text == "caught" or self.text.startswith("not judged")


def misfit(bug: Bug) -> str | None:
    """Why a patch cannot be planted, or None."""
    path = ROOT / "src" / "drpo" / bug.file
    if not path.is_file():
        return f"no longer applies: no file src/drpo/{bug.file}"
    count = path.read_text().count(bug.old)
    return None if count == 1 else f"no longer applies: its old text occurs {count} times"


@contextmanager
def sandbox(bug: Bug | None) -> Iterator[Path]:
    """A copy of the project, with the bug planted."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        root = Path(name)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            elif (ROOT / part).exists():
                shutil.copy2(ROOT / part, root / part)
        if bug:
            path = root / "src" / "drpo" / bug.file
            path.write_text(path.read_text().replace(bug.old, bug.new))
            if path.suffix == ".py":
                compile(path.read_text(), bug.file, "exec")
        yield root


def run_python(root: Path, *arguments: str, planted: Replacement | None = None) -> subprocess.CompletedProcess[str]:
    """Run this interpreter inside a sandbox; only the sandbox's own `drpo` can be imported."""
    folders = ["src", "studies", "tests", *(["tests/planting"] if planted else [])]
    paths = os.pathsep.join(str(root / folder) for folder in folders)
    own = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env = {"DRPO_SHARED": str(ROOT.parent / "shared"), **os.environ, **own}
    if planted:
        env["DRPO_PLANTED"] = f"{planted.module}={planted.name}"
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def run_tests(
    root: Path, tests: tuple[str, ...], planted: Replacement | None = None
) -> subprocess.CompletedProcess[str]:
    first = ["-x"] if len(tests) == 1 else []
    options = ["-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "default"]
    return run_python(
        root, "-m", "pytest", *options, *first, "--hypothesis-profile=no_shrinking", *tests, planted=planted
    )


def unpatched(bugs: list[Bug | Replacement]) -> str | None:
    """What is wrong before any bug is planted, or None."""
    tests = tuple(dict.fromkeys(test for bug in bugs for test in bug.tests))
    with sandbox(None) as root:
        where = run_python(root, "-c", "import drpo; print(drpo.__file__)").stdout.strip()
        if not Path(where).resolve().is_relative_to(root.resolve()):
            return f"the sandbox imports drpo from {where!r}, not from its own copy"
        result = run_tests(root, tests)
    return None if result.returncode == 0 else f"on the source as it is:\n{result.stdout}{result.stderr}"


def plant(bug: Bug | Replacement) -> Verdict:
    """Plant one bug, run its tests, and say whether each of them failed."""
    if isinstance(bug, Bug) and (wrong := misfit(bug)):
        return Verdict(wrong)
    start = time.perf_counter()
    try:
        if isinstance(bug, Bug):
            with sandbox(bug) as root:
                result = run_tests(root, bug.tests)
        else:  # the source stays what it is
            result = run_tests(ROOT, bug.tests, bug)
        text = judged(bug, result)
    except subprocess.TimeoutExpired:  # a test that never ends does not pass
        text = "caught"
    return Verdict(text, time.perf_counter() - start)


def judged(bug: Bug | Replacement, result: subprocess.CompletedProcess[str]) -> str:
    """What a run of a bug's tests says of it."""
    if result.returncode not in (0, 1):  # neither passed nor failed: nothing was collected, or it could not be imported
        return f"pytest could not run (status {result.returncode}):\n{(result.stdout + result.stderr)[-1500:]}"
    if " skipped" in result.stdout and " passed" not in result.stdout and " failed" not in result.stdout:
        return "not judged: its tests are skipped here"
    failed = re.findall(r"^FAILED (\S+?::.*?)(?: - .*)?$", result.stdout, flags=re.MULTILINE)
    passed = [test for test in bug.tests if not any(is_case_of(node, test) for node in failed)]
    return f"SURVIVED {', '.join(passed)}" if passed else "caught"


def is_case_of(node: str, test: str) -> bool:
    """True where `node` is the test, or one of its parametrised cases."""
    return node == test or node.startswith(f"{test}[")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="only these bug classes")
    parser.add_argument("--named", nargs="+", metavar="TEXT", help="only those with one of these in their name")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="sandboxes at a time")
    options = parser.parse_args()
    replacements = [] if options.only else list(all_replacements().values())
    bugs: list[Bug | Replacement] = [*all_bugs(), *replacements]
    if options.only:
        bugs = [bug for bug in all_bugs() if bug.number in options.only]
    if options.named:
        bugs = [bug for bug in bugs if any(text in bug.name for text in options.named)]
    if not bugs:
        parser.error("no such bug")
    good = True
    with ThreadPoolExecutor(options.workers) as pool:
        baseline, verdicts = pool.submit(unpatched, bugs), pool.map(plant, bugs)
        for bug, verdict in zip(bugs, verdicts, strict=True):
            print(f"{getattr(bug, 'number', ''):>2}  {verdict.seconds:5.1f} s  {bug.name}: {verdict.text}", flush=True)
            good &= verdict.good
        if wrong := baseline.result():
            print(wrong)
            good = False
    print(f"{len(bugs)} bugs planted; {'none survived' if good else 'see above'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
