"""The implementation of `drpo compare`."""

from pathlib import Path

from drpo.cli.commands.compare import WARM_UP_ONCE, CompareOptions, ResumeOptions
from drpo.cli.folder import at_server, open_run, resume_flag
from drpo.cli.methods import print_method
from drpo.cli.output import attempt, writing_folder
from drpo.cli.runs import reading
from drpo.errors import InputError, one_line
from drpo.lab.compare import begun, models_of
from drpo.lab.compare import compare as train_trials
from drpo.lab.grid import REGIME, Grid, Variant, parse_regime, parse_variant, runs
from drpo.lab.trial_result import FAILED, prepare, read_comparison, read_trial
from drpo.lab.worker_pool import fitting
from drpo.live.progress import ComparisonConsole
from drpo.report.comparison_page import write_comparison_report
from drpo.report.comparison_table import print_comparison
from drpo.terminal import Terminal
from drpo.train.config import Run, load_run
from drpo.train.records import CONFIG


def begin(name: str, base: Run, options: CompareOptions) -> int:
    """Train every combination of the given values, in a new or an existing comparison."""
    folder = options.out or Path("runs") / f"compare-{name}"
    planned_runs = planned(base, options)
    print_method(Terminal(), base, options.method)
    with writing_folder("--out", folder):
        if (folder / CONFIG).exists():
            raise InputError(f"--out {folder}: a single run is there; name another folder")
        return _compare(folder, prepare(folder, planned_runs), options.jobs, options.plain)


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
    """Return the runs of a comparison's trials; without objectives that of the method.

    Raises:
        InputError: an invalid objective or regime.
    """
    if base.warm_up is not None:
        raise InputError(f"warm_up: {WARM_UP_ONCE}")
    regimes = {field: parse_regime(field, [str(v) for v in getattr(options, field)]) for field in REGIME}
    variants = tuple(map(parse_variant, options.objectives))
    if options.method is not None and not variants:
        variants = (Variant(base.objective.loss),)
    return runs(base, Grid(variants, options.seeds, options.learning_rate, regimes))


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
    status = run_trials(folder, trials, jobs, plain)
    console = Terminal()
    comparison = read_comparison(folder)
    if any(c.over for c in comparison.trials):
        print_comparison(console, comparison)
        path = attempt("report", folder, lambda: write_comparison_report(folder, comparison))
        if path is not None:
            console.print(f"report       {path}", soft_wrap=True)
        console.print(f"everything   {folder}", soft_wrap=True)
    for trial in comparison.trials:
        if trial.status == FAILED:
            console.print(one_line(f"failed: {trial.name}: {trial.reason}"), style="red", soft_wrap=True)
    if any(not c.over for c in comparison.trials):
        again = next(filter(None, (resume_flag(load_run(trial, trust_remote_code=False)) for trial in trials)), "")
        console.print(f"go on with: drpo compare --resume {folder}{again}", soft_wrap=True)
    return status
