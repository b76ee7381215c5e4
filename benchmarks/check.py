"""Has it become slower than the committed results say? `python -m benchmarks.check`, or `make bench-check`."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.cases import OURS, Case
from benchmarks.command import Parser, status
from benchmarks.parts import PARTS, Scale
from benchmarks.results import FOLDER, read
from benchmarks.rounds import FLOOR, column, measure, times
from benchmarks.table import headline
from benchmarks.worker_pool import WorkerPool
from drpo.errors import InputError
from drpo.model.device import choose_device
from drpo.model.precision import has_fast_bf16

ALLOWED = 0.10
"""A ratio may grow by this share."""
ROUND_SECONDS = 10.0
"""Longer cases are left out: those of which a round took more than this when the committed results were measured."""
LEAST_ROUNDS = 2
COMPARED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "head": (("linear_policy_loss", "products alone"), ("linear_logprob", "products alone")),
    "rollout": (("drpo", "transformers"),),
    "step": (("drpo", FLOOR),),
}
"""Part -> what of this project is divided by what that is not its own, so that a gain is never taken for a loss."""

DESCRIPTION = """Measure the short cases of the committed results again, and compare ratios with theirs.

Each ratio is of two things that took turns in the same rounds: the head to its three matrix products, rollouts to
transformers' generate, a step to its floor. Medians over rounds are compared. A ratio that is more than 10 % above the
committed one is measured once more, and is a loss where it is above again. The status is 1 where there is a loss."""


@dataclass(frozen=True)
class Ratio:
    """A ratio now, and as it was committed; larger is slower.

    Args:
        name: of what to what, in which case.
        now, before: medians over rounds.
    """

    name: str
    now: float
    before: float

    @property
    def is_loss(self) -> bool:
        """True where it has grown by more than `ALLOWED`."""
        return self.now > (1 + ALLOWED) * self.before

    def __str__(self) -> str:
        return f"{self.name}: {self.now:.2f}, was {self.before:.2f} ({self.now / self.before - 1:+.0%})"


def medians(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratios of a case that are compared, by name: medians over the rounds.

    Args:
        record: of a case, as results have it; one of fewer than `LEAST_ROUNDS` rounds has none, nor have steps whose
            completions end where they end, which is chance.
    """
    if record["parameters"].get("regime", "full") != "full":
        return {}
    found = {}
    for ours, other in COMPARED.get(record["part"], ()):
        values = times(record, ours, other)
        if len(values) >= LEAST_ROUNDS:
            found[f"{record['part']}: {record['name']}: {ours} / {other}"] = median(values)
    return found


def compare(fresh: Iterable[Mapping[str, Any]], committed: Iterable[Mapping[str, Any]]) -> list[Ratio]:
    """Return the ratios that both have.

    Args:
        fresh, committed: records of cases.
    """
    before = {name: value for record in committed for name, value in medians(record).items()}
    now = {name: value for record in fresh for name, value in medians(record).items()}
    return [Ratio(name, value, before[name]) for name, value in now.items() if name in before]


def round_seconds(record: Mapping[str, Any]) -> float:
    """Return how long a round of what is compared took: the sum of the medians."""
    names = {name for pair in COMPARED.get(record["part"], ()) for name in pair}
    times = (column(record["rounds"], name, "seconds") for name in names)
    return sum(median(seconds) for seconds in times if seconds)


def committed_for(here: Mapping[str, Any], against: Path | None) -> Path:
    """Return the file to compare with.

    Args:
        here: the machine, as `machine.describe` returns it.
        against: the file that was asked for, or None.

    Raises:
        InputError: there are no results for this kind of processor.
    """
    path = against or FOLDER / f"{machine.name(dict(here))}.json"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json") if not p.stem.endswith("-quick"))) or "none"
        raise InputError(
            f"no results of {path.stem} ({here['processor']}, {here['cores']} cores); there are: {there}; "
            "`make bench` measures them here, --against FILE compares with others"
        )
    return path


def short_cases(committed: Sequence[Mapping[str, Any]], path: Path) -> set[tuple[str, str]]:
    """Return part and name of the cases to measure again.

    Raises:
        InputError: there is none.
    """
    found = {(r["part"], r["name"]) for r in committed if medians(r) and round_seconds(r) <= ROUND_SECONDS}
    if not found:
        parts = ", ".join(dict.fromkeys(r["part"] for r in committed)) or "nothing"
        raise InputError(
            f"{path.name} has {parts}, and no short case of {', '.join(COMPARED)} with {LEAST_ROUNDS} rounds to "
            "compare; `python -m benchmarks --only rollout --match 'x 32 tokens' --peers none` measures some"
        )
    return found


def to_measure(wanted: set[tuple[str, str]], scale: Scale) -> list[Case]:
    """Return the cases of these parts and names with the entrants that are compared alone."""
    cases = [case for part in COMPARED if any(p == part for p, _ in wanted) for case in PARTS[part](scale)]
    named = {name for pairs in COMPARED.values() for pair in pairs for name in pair} | {"matrix products"}
    return [
        replace(case, entrants=tuple(e for e in case.entrants if e.name in named), skipped={})
        for case in cases
        if (case.part, case.name) in wanted
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None takes the process's own.

    Returns:
        The exit status: 0 no loss, 1 a loss or a case that failed, 2 bad input or nothing to compare with,
        130 interrupted.
    """
    return status("bench-check", lambda: _run(_parsed(argv)))


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, default=None, metavar="FILE", help="results to compare with")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case; default 5")
    arguments = parser.parse_args(argv)
    if arguments.repeats < LEAST_ROUNDS:
        raise InputError(f"repeats={arguments.repeats}: must be at least {LEAST_ROUNDS}")
    return arguments


def _run(arguments: argparse.Namespace) -> int:
    against, match, repeats = arguments.against, arguments.match, arguments.repeats
    here = machine.describe()
    path = committed_for(here, against)
    results = read(path, "against")
    committed = results["cases"]
    wanted = {(part, name) for part, name in short_cases(committed, path) if match in name}
    scale = Scale(
        quick=False,
        repeats=repeats,
        cuda=here["accelerator"] is not None,
        memory_bytes=machine.memory_bytes(),
        fast_bf16=has_fast_bf16(choose_device()),
    )
    cases = to_measure(wanted, scale)
    if not cases:
        raise InputError(f"match={match!r}: none of the cases to compare can be measured here")
    for name in ("processor", "torch"):
        if results["machine"][name] != here[name]:
            print(f"note: {path.name} is of {name} {results['machine'][name]}; here is {here[name]}")
    fresh = _measured(cases, repeats)
    found = compare(fresh, committed)
    doubtful = {ratio.name for ratio in found if ratio.is_loss}
    if doubtful:
        suspects = [case for case in cases if any(n.startswith(f"{case.part}: {case.name}: ") for n in doubtful)]
        print(f"measuring again: {'; '.join(case.name for case in suspects)}", file=sys.stderr)
        again = {ratio.name: ratio for ratio in compare(_measured(suspects, repeats), committed)}
        found = [min(r, again.get(r.name, r), key=lambda x: x.now) if r.name in doubtful else r for r in found]
    failed = [f"{r['part']}: {r['name']}: {n}: {text}" for r in fresh for n, text in r["failures"].items()]
    lost = [f"{ratio}" for ratio in found if ratio.is_loss]
    for line in failed + lost:
        print(line)
    print(f"{len(found) - len(lost)} of {len(found)} ratios within {ALLOWED:.0%} of {os.path.relpath(path)}")
    return 1 if failed or lost else 0


def _measured(cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
    records = []
    with WorkerPool({OURS: Path(sys.executable)}, threads=machine.cores()) as pool:
        for case in cases:
            records.append(measure(case, pool, repeats, lambda text: None))
            print(headline(records[-1]), file=sys.stderr)
    return records


if __name__ == "__main__":
    sys.exit(main())
