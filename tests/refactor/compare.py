"""Does the present tree compute what the recorded commit computed? Runs both, and compares value by value.

    python tests/refactor/compare.py                     all runs: tiny ones, two processes, SmolLM2
    python tests/refactor/compare.py --only tiny         a group, or names, or patterns: 'critic*' lag
    python tests/refactor/compare.py --list              what there is
    python tests/refactor/compare.py --only drpo --perturb 1.01    must fail: the new side learns 1 % faster

Compared are, for every step: each completion's prompt ids, token ids, text and reward; each trained token's behaviour
log-probability, log-probability under the policy, advantage, weight, entropy, divergence, value and return; each
update's loss, gradient norm and learning rate; all metrics and evaluations; and the final weights, tensor by tensor.
Floats are compared bit for bit, but for runs with a critic (1e-6). Keys that were renamed are in renamed.py; what
differs between the sides in how they are run is in old.py and new.py.

The exit status is 0 where nothing moved, 1 with a table of what did, 2 where a side could not be run.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from driver import PERTURB, STATUS
from renamed import ADDED, TABLES
from runs import Run, all_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECORDED = "6ad2188"
CACHE = Path(tempfile.gettempdir()) / f"drpo-refactor-{os.getuid()}"
PROCESSES = {"tiny": 1, "ranks": 2, "smollm2": 1}
ABSENT = "absent"
LINES = 20
"""Of the table of one run, unless --all asks for every value."""
NOT_NUMBERS = math.inf
"""The size of a difference between values that are not both numbers."""

Values = dict[tuple[str, str, tuple[str, ...]], Any]
"""(kind, place, path of keys) -> value."""


class SideError(Exception):
    """One of the sides could not be run."""


@dataclass(frozen=True)
class Moved:
    """One value that is not what it was."""

    kind: str
    place: str
    key: str
    before: Any
    after: Any
    size: float


def main() -> int:
    options = _options()
    runs = _chosen(options.only)
    if options.list:
        for run in runs:
            tolerance = f"to {run.tolerance:g}" if run.tolerance else "bit for bit"
            print(f"{run.name:<22} {run.group:<8} {tolerance:<12} {run.recipe} {dict(run.settings)}")
        return 0
    try:
        old = _recorded(options.commit, runs)
        new = _present(runs, options.perturb)
    except SideError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return _report(runs, old, new, options.all)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="runs, groups (tiny, ranks, smollm2) or patterns"
    )
    parser.add_argument("--list", action="store_true", help="print the runs and their settings, and do nothing")
    parser.add_argument(
        "--commit", default=RECORDED, help="the recorded commit, in the words of old.py (default: %(default)s)"
    )
    parser.add_argument(
        "--perturb", type=float, metavar="FACTOR", help="multiply the new side's learning rate: must fail"
    )
    parser.add_argument("--all", action="store_true", help="a line for every value that moved, not for every key")
    return parser.parse_args()


def _chosen(patterns: Sequence[str]) -> list[Run]:
    runs = all_runs()
    for pattern in patterns:
        if not any(_matches(run, pattern) for run in runs):
            raise SystemExit(f"compare: --only {pattern}: no such run or group; --list shows them")
    return [run for run in runs if any(_matches(run, pattern) for pattern in patterns)]


def _matches(run: Run, pattern: str) -> bool:
    return run.group == pattern or fnmatch(run.name, pattern)


# Running a side


def _recorded(commit: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The recorded commit's results; those that this machine has are not computed again."""
    full = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    files = {run.name: CACHE / full / f"{run.name}-{_digest(run)}.json" for run in runs}
    missing = [run for run in runs if not files[run.name].exists()]
    if missing:
        with _worktree(full) as tree, tempfile.TemporaryDirectory(prefix="drpo-old-") as folder:
            found = _run_side("old", tree, missing, Path(folder))
            for run in missing:
                files[run.name].parent.mkdir(parents=True, exist_ok=True)
                shutil.move(found[run.name], files[run.name])
    return {name: json.loads(path.read_text()) for name, path in files.items()}


def _present(runs: Sequence[Run], perturb: float | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="drpo-new-") as folder:
        found = _run_side("new", ROOT, runs, Path(folder), perturb)
        return {name: json.loads(path.read_text()) for name, path in found.items()}


def _digest(run: Run) -> str:
    """Of all that a result of the recorded commit depends on besides the commit."""
    sources = [(HERE / name).read_text() for name in ("old.py", "driver.py", "world.py")]
    libraries = [metadata.version(name) for name in ("torch", "transformers", "numpy")]
    about = [repr(run), *sources, *libraries, sys.version, platform.node(), platform.processor()]
    return hashlib.sha256("\0".join(about).encode()).hexdigest()[:12]


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="drpo-worktree-"))
    tree = folder / "tree"
    try:
        _git("worktree", "add", "--detach", str(tree), commit)
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SideError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _run_side(
    side: str, tree: Path, runs: Sequence[Run], folder: Path, perturb: float | None = None
) -> dict[str, Path]:
    """Run on one side and return the files of results: all of a group in one process, or each run in two."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree / "src")}
    if perturb is not None:
        environment[PERTURB] = str(perturb)
    for group, processes in PROCESSES.items():
        names = [run.name for run in runs if run.group == group]
        # A second process group in the same processes finds what the first left of its meshes.
        for part in ([name] for name in names) if processes > 1 else [names] if names else []:
            print(
                f"{side}: {', '.join(part) if len(part) < 4 else f'{len(part)} of {group}'}",
                file=sys.stderr,
                flush=True,
            )
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [str(HERE / f"{side}.py"), str(folder), *part]
            _run([sys.executable, *(launcher if processes > 1 else []), *command], folder, environment)
    return {run.name: folder / f"{run.name}.json" for run in runs}


def _run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        log = CACHE / "failed.log"
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(done.stdout)
        said = "\n".join(done.stdout.decode(errors="replace").splitlines()[-12:])
        raise SideError(f"{' '.join(command)}: status {done.returncode}; {log} has all it said\n{said}")


# Comparing


def compare(run: Run, old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Moved], float]:
    """Return what moved beyond the run's tolerance, and the largest difference between numbers, tolerated ones too."""
    before, after = _translated(_flat(old), run), _flat(new)
    added = [] if run.unfinished else [at for at in after if at not in before and at[2][-1] not in ADDED.get(at[0], ())]
    moved: list[Moved] = []
    largest = 0.0
    for at in [*before, *added]:
        if run.unfinished and at[0] == STATUS:
            continue
        if at[2][-1] == "sha256" and (*at[:2], (*at[2][:-1], "numbers")) in before:
            continue
        found = list(_differences(before.get(at, ABSENT), after.get(at, ABSENT)))
        largest = max([largest, *(size for _, _, _, size in found if size != NOT_NUMBERS)])
        key = ".".join(at[2])
        moved += [Moved(at[0], at[1], f"{key}{i}", x, y, size) for i, x, y, size in found if size > run.tolerance]
    return moved, largest


def _flat(observed: dict[str, Any]) -> Values:
    return {
        (kind, place, path): value
        for kind, places in observed.items()
        for place, record in places.items()
        for path, value in _leaves(record, ())
    }


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Records inside records, and in lists, as paths of keys; a list of plain values is one value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name))
    elif isinstance(value, list) and any(isinstance(x, dict) for x in value):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(i)))
    else:
        yield path, value


def _translated(values: Values, run: Run) -> Values:
    """The recorded commit's values under their present names."""
    translated: Values = {}
    for (kind, place, path), value in values.items():
        names = [TABLES.get(kind, {}).get(name, name) for name in path]
        for name in names:
            if isinstance(name, tuple):
                value = name[1](value, run.settings)
        if None not in names:
            translated[kind, place, tuple(n[0] if isinstance(n, tuple) else str(n) for n in names)] = value
    return translated


def _differences(before: Any, after: Any) -> Iterator[tuple[str, Any, Any, float]]:
    """Yield (index, before, after, size) wherever two values differ: |before - after| / max(1, |before|) of numbers."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            for inner, *rest in _differences(x, y):
                yield (f"[{i}]{inner}", *rest)
    elif _is_number(before) and _is_number(after):
        if float(before).hex() != float(after).hex():
            size = abs(before - after) / max(1.0, abs(before))
            yield "", before, after, size if size > 0 else NOT_NUMBERS  # NaN, or zeros of different sign
    elif before != after or type(before) is not type(after):
        yield "", before, after, NOT_NUMBERS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Reporting


def _report(runs: Sequence[Run], old: dict[str, Any], new: dict[str, Any], every: bool) -> int:
    failed, compared = 0, 0
    for run in runs:
        if not old[run.name].get("token"):
            print(f"{run.name}: the recorded commit trained on nothing: {old[run.name][STATUS]}")
            failed += 1
            continue
        moved, largest = compare(run, old[run.name], new[run.name])
        compared += sum(len(v) if isinstance(v, list) else 1 for v in _flat(old[run.name]).values())
        failed += bool(moved)
        if run.tolerance:
            print(f"{run.name}: largest difference {largest:.3g} (allowed {run.tolerance:g})")
        for line in _table(run.name, moved, every):
            print(line)
    print(f"{len(runs) - failed} of {len(runs)} runs are equal; {compared:,} values compared")
    return 1 if failed else 0


def _table(name: str, moved: Sequence[Moved], every: bool) -> Iterator[str]:
    """A line for each key that moved, where it first did; or for every value."""
    if moved:
        yield f"{name}: {len(moved)} values moved"
    first: dict[tuple[str, str], list[Moved]] = {}
    for m in moved:
        first.setdefault((m.kind, m.key if every else m.key.split("[")[0]), []).append(m)
    shown = list(first.items()) if every else list(first.items())[:LINES]
    for (kind, key), same in shown:
        for m in same if every else same[:1]:
            size = max(x.size for x in ([m] if every else same))
            places = "" if every or len(same) == 1 else f"  and {len(same) - 1} more"
            moves = f"{_shown(m.before)} -> {_shown(m.after)}"
            yield (
                f"  {kind} {key}, {m.place}: {moves}"
                + ("" if size == NOT_NUMBERS else f"  largest {size:.3g}")
                + places
            )

    if len(shown) < len(first):
        yield f"  ... and {len(first) - len(shown)} keys more; --all shows every value"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


if __name__ == "__main__":
    sys.exit(main())
