"""The implementation of `drpo compare`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from drpo.cli.commands.compare import WARM_UP_ONCE, CompareOptions, ResumeOptions
from drpo.cli.folder import at_server, open_run, resume_flag
from drpo.cli.methods import print_method
from drpo.cli.output import attempt, refusing, writing_folder
from drpo.cli.runs import reading
from drpo.errors import InputError, as_typed, one_line
from drpo.files import write_text
from drpo.lab.claims import PLAN, ClaimPlan, plan_of, read_plan
from drpo.lab.compare import begun, models_of
from drpo.lab.compare import compare as train_trials
from drpo.lab.grid import REGIME, Grid, Variant, parse_regime, parse_variant, runs
from drpo.lab.halving import TUNING, halved, rates_of, require_tunable, round_grid, seeds_per_round
from drpo.lab.looks import due, joined, planned_comparison, power_lines, require_possible
from drpo.lab.trial_result import (
    FAILED,
    WAITING,
    is_comparison,
    prepare,
    read_comparison,
    read_trial,
    trial_folders,
)
from drpo.lab.worker_pool import fitting
from drpo.live.progress import ComparisonConsole
from drpo.objectives import REGISTRY
from drpo.report.comparison_page import write_comparison_report
from drpo.report.comparison_table import print_comparison
from drpo.spec import format_spec
from drpo.terminal import Terminal
from drpo.train.config import Run, load_run
from drpo.train.records import CONFIG


def begin(name: str, base: Run, options: CompareOptions) -> int:
    """Train every combination of the given values, in a new or an existing comparison."""
    folder = options.out or Path("runs") / f"compare-{name}"
    grid = grid_of(base, options)
    planned_runs = runs(base, _first_rates(grid, options.tuning_seeds))
    with refusing(f"--out {folder}", "name a folder that can be written to"):
        plan = named_plan(folder, options.claims, planned_runs)
    print_method(Terminal(), base, options.method)
    with writing_folder("--out", folder):
        if (folder / CONFIG).exists():
            raise InputError(f"--out {folder}: a single run is there; name another folder")
        keep_claims(folder, options.claims)
        if options.tuning_seeds:
            grid, status = tuned(folder / TUNING, base, grid, options)
            if status:
                return status
            planned_runs = runs(base, grid)
        if plan is None:
            return _compare(folder, prepare(folder, planned_runs), options.jobs, options.plain)
        return _report(folder, train_in_looks(folder, plan, planned_runs, options.jobs, options.plain))


def named_plan(folder: Path, path: Path | None, planned_runs: Sequence[Run]) -> ClaimPlan | None:
    """Return what a comparison may claim: the plan in its folder, or a new one before its first trial begins.

    Raises:
        InputError: another plan is there, or results are; or the planned runs cannot decide it.
    """
    there = plan_of(folder)
    plan = there if path is None else read_plan(path)
    if plan is not None:
        require_possible(plan, planned_comparison(planned_runs))
    if path is None or plan is None:
        return plan
    if there is not None and there != plan:
        raise InputError(f"--claims {path}: {folder / PLAN} names other claims, and these stay; name another --out")
    begun_before = is_comparison(folder) and any(t.status != WAITING for t in read_comparison(folder).trials)
    if there is None and begun_before and not plan.after_results:
        raise InputError(
            f"--claims {path}: trials of {folder} have begun, and claims are named before; name another --out, or put "
            "after_results = true into the file"
        )
    return plan


def keep_claims(folder: Path, path: Path | None) -> None:
    """Copy a claims file into a comparison's folder."""
    if path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, path.read_text(encoding="utf-8"))


def _first_rates(grid: Grid, tuning_seeds: tuple[int, ...]) -> Grid:
    """Return a grid as it will be after tuning, with the first rate in the place of the best."""
    if not tuning_seeds:
        return grid
    require_tunable(grid, tuning_seeds)
    return replace(grid, variants=tuple(replace(v, learning_rates=v.learning_rates[:1]) for v in rates_of(grid)))


def tuned(folder: Path, base: Run, grid: Grid, options: CompareOptions) -> tuple[Grid, int]:
    """Choose each objective's learning rate by successive halving; return the grid with it, and the exit status."""
    variants = rates_of(grid)
    for n in seeds_per_round(max(len(v.learning_rates) for v in variants), len(options.tuning_seeds)):
        seeds = options.tuning_seeds[:n]
        trials = prepare(folder, runs(base, round_grid(grid, variants, seeds)))
        status = run_trials(folder, trials, options.jobs, options.plain)
        if status:
            return grid, status
        variants = halved(variants, read_comparison(folder), seeds)
    for variant in (v for v in variants if v.learning_rates):
        name = format_spec(variant.objective, REGISTRY)
        Terminal().print(f"chosen       {name} @ {variant.learning_rates[0]:g}", soft_wrap=True)
    return replace(grid, variants=tuple(variants)), 0


def train_in_looks(folder: Path, plan: ClaimPlan, planned_runs: Sequence[Run], jobs: int | None, plain: bool) -> int:
    """Train the first seeds of all, then more seeds of what is undecided, look by look; return the exit status."""
    whole, status = planned_comparison(planned_runs), 0
    for line in power_lines(plan, whole):
        Terminal().print(f"claims       {line}", highlight=False, soft_wrap=True)
    while status == 0:
        so_far = read_comparison(folder) if trial_folders(folder) else whole
        names = due(plan, joined(whole, so_far))
        trials = prepare(folder, [run for run in planned_runs if run.name in names])
        if all(read_trial(trial).over for trial in trials):
            break
        status = run_trials(folder, trials, jobs, plain)
    return status


def resume(folder: Path, options: ResumeOptions) -> int:
    """Train the trials of a comparison that have no result yet."""
    trials = begun(folder)
    with reading(folder):
        for trial in trials:
            run = open_run(trial, options.trust_remote_code)
            if at_server(run, trial, options.engine) != run:
                raise InputError(f"--engine {options.engine}: {trial} samples with {run.rollout.engine}")
            read_trial(trial)
    with writing_folder("--resume", folder):
        return _compare(folder, trials, options.jobs, options.plain)


def planned(base: Run, options: CompareOptions) -> list[Run]:
    """Return the runs of a comparison's trials.

    Raises:
        InputError: as `grid_of`.
    """
    return runs(base, grid_of(base, options))


def grid_of(base: Run, options: CompareOptions) -> Grid:
    """Return what a comparison varies; without objectives that of the method.

    Raises:
        InputError: an invalid objective or regime.
    """
    if base.warm_up is not None:
        raise InputError(f"warm_up: {WARM_UP_ONCE}")
    regimes = {field: parse_regime(field, [str(v) for v in getattr(options, field)]) for field in REGIME}
    variants = tuple(map(parse_variant, options.objectives))
    if options.method is not None and not variants:
        variants = (Variant(base.objective.loss),)
    return Grid(variants, options.seeds, options.learning_rate, regimes)


def run_trials(folder: Path, trials: list[Path], jobs: int | None, plain: bool) -> int:
    """Train trials and show progress; return the exit status: 1 if one failed, 128 + n if signal n ended it."""
    console = Terminal()
    models = models_of(trials)
    size = min((fitting(model, jobs, len(trials)) for model in models), key=lambda c: c.jobs)
    todo = [trial for trial in map(read_trial, trials) if not trial.over]
    console.print(
        f"{len(todo)} of {len(trials)} trainings to do, of {', '.join(sorted(models))}, {sum(c.steps for c in todo):,} "
        f"steps in all, in {folder}; {size.jobs} at once with {size.threads} thread(s) each",
        soft_wrap=True,
    )
    with ComparisonConsole(console, console.is_terminal and not plain, trials) as shown:
        comparison, signal = train_trials(folder, trials, size, shown.tick, shown.note)
    if signal is not None:
        return 128 + signal
    return 1 if any(c.status == FAILED for c in comparison.trials) else 0


def _compare(folder: Path, trials: list[Path], jobs: int | None, plain: bool) -> int:
    return _report(folder, run_trials(folder, trials, jobs, plain))


def _report(folder: Path, status: int) -> int:
    console = Terminal()
    comparison, trials = read_comparison(folder), trial_folders(folder)
    if any(c.over for c in comparison.trials):
        print_comparison(console, comparison, plan_of(folder))
        path = attempt("report", folder, lambda: write_comparison_report(folder, comparison))
        if path is not None:
            console.print(f"report       {path}", soft_wrap=True)
        console.print(f"everything   {folder}", soft_wrap=True)
    for trial in comparison.trials:
        if trial.status == FAILED:
            console.print(one_line(f"failed: {trial.name}: {trial.reason}"), style="red", soft_wrap=True)
    if any(not c.over for c in comparison.trials):
        again = next(filter(None, (resume_flag(load_run(trial, trust_remote_code=False)) for trial in trials)), "")
        console.print(f"go on with: drpo compare --resume {as_typed(folder)}{again}", soft_wrap=True)
    return status
