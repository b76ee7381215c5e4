"""The stability benchmark, with maps: `python studies/stability.py --help`."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from command import run
from drpo.cli.commands.compare import require_jobs
from drpo.cli.compare import keep_claims, named_plan, run_trials, train_in_looks
from drpo.cli.options import parse
from drpo.cli.output import attempt, writing_folder
from drpo.lab.grid import Grid, parse_variant, runs
from drpo.lab.trial_result import prepare, read_comparison, read_trial, trial_folders
from drpo.report.comparison_page import write_comparison_report
from drpo.report.comparison_table import print_comparison
from drpo.terminal import Terminal
from drpo.train.config import Run
from drpo.train.records import ROLLOUTS
from stability_maps import draw_maps
from tail_language import KINDS, base, task_of

OBJECTIVES = ("none", "ppo(0.2, 0.28)", "spo(3)", "dppo(0.15)", "drpo(12.5)", "drpo(0.2)")
UPDATES = (4, 16)
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
PRECISIONS = ("fp32", "fp8")


def stability_runs(
    objectives: Sequence[str] = OBJECTIVES,
    seeds: Sequence[int] = (0, 1),
    updates: Sequence[int] = UPDATES,
    learning_rates: Sequence[float] = LEARNING_RATES,
    precisions: Sequence[str] = PRECISIONS,
) -> list[Run]:
    """Return the runs of the benchmark: both tasks of `tail`, and every combination of what is given.

    Args:
        objectives: as `grid.parse_variant` reads them.
        seeds: of each.
        updates: optimiser updates per rollout: staleness.
        learning_rates: of each.
        precisions: of the sampler, beside a trainer in fp32: mismatch.

    Example:
        >>> len(stability_runs()), len({run.name for run in stability_runs()})
        (288, 288)
    """
    grid = Grid(
        variants=tuple(map(parse_variant, objectives)),
        seeds=tuple(seeds),
        learning_rates=tuple(learning_rates),
        regimes={"updates": tuple(updates), "rollout_precision": tuple(precisions)},
    )
    return [run for kind in KINDS for run in runs(base(kind), grid)]


TITLES = {
    "noise": "the tail is noise: the reward looks at common words alone",
    "meaning": "the tail carries meaning: the reward looks at rare words alone",
}


@dataclass(frozen=True)
class StabilityOptions:
    """Map the stability of trust regions, with a tiny transformer over a long-tailed vocabulary.

      python studies/stability.py --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' --rollout-precision fp32

    In one of two tasks rare words are noise, in the other they carry the meaning. Every combination of the given values
    is a training of seconds. The default is 288 trainings in runs/lab, minutes on two cores. Ctrl-C stops them; the
    same command resumes. docs/stability.md has the results.

    Args:
        objectives: none, ppo(0.2,0.28), spo(3), dppo(0.15), drpo(12.5), drpo(0.2), ..., or your own module:name; after
            an @ its own learning rates.
        seeds: of each.
        updates: optimiser updates per rollout, which make the data stale.
        learning_rate: of each.
        rollout_precision: of the sampler, with a trainer in fp32: fp32, bf16, int8, fp8_weights, fp8.
        claims: file that names in advance what may be claimed (docs/statistics.md); more seeds are trained of what is
            undecided.
        out: folder for the comparison (OUT/stability) and the maps; finished trainings are kept.
        jobs: trainings at once; default: one per core.
        plain: plain lines in place of the live table.
    """

    objectives: tuple[str, ...] = OBJECTIVES
    seeds: tuple[int, ...] = (0, 1)
    updates: tuple[int, ...] = UPDATES
    learning_rate: tuple[float, ...] = LEARNING_RATES
    rollout_precision: tuple[str, ...] = PRECISIONS
    claims: Path | None = None
    out: Path = Path("runs/lab")
    jobs: int | None = None
    plain: bool = False


def stability(arguments: Sequence[str]) -> int:
    """Train what is missing, print the tables, draw the maps and the report; return the exit status."""
    options = parse(StabilityOptions, list(arguments), "python studies/stability.py")
    require_jobs(options.jobs)
    folder = options.out / "stability"
    planned = stability_runs(
        options.objectives, options.seeds, options.updates, options.learning_rate, options.rollout_precision
    )
    plan = named_plan(folder, options.claims, planned)
    _let_workers_import_the_language()
    with writing_folder("--out", options.out):
        keep_claims(folder, options.claims)
        if plan is None:
            status = run_trials(folder, prepare(folder, planned), options.jobs, options.plain)
        else:
            status = train_in_looks(folder, plan, planned, options.jobs, options.plain)
    _delete_rollouts(folder)
    comparison = read_comparison(folder)
    if not any(c.over for c in comparison.trials):
        return status
    console = Terminal()
    print_comparison(console, comparison, plan, best_only=True)
    for kind in KINDS:
        path = options.out / f"stability_{kind}.png"
        if attempt("map", folder, partial(draw_maps, comparison, task_of(kind), TITLES[kind], path)) is not None:
            console.print(f"map          {path}", soft_wrap=True)
    page = attempt("report", folder, lambda: write_comparison_report(folder, comparison))
    if page is not None:
        console.print(f"report       {page}", soft_wrap=True)
    return status


def _let_workers_import_the_language() -> None:
    """Put this folder on the workers' path: the runs name `tail_language:Tail` and `speaker`."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def _delete_rollouts(folder: Path) -> None:
    """Delete the rollouts of finished runs; results.json does not need them."""
    for trial in trial_folders(folder):
        if read_trial(trial).over:
            (trial / ROLLOUTS).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(run(stability))
