"""`drpo compare`."""

from dataclasses import dataclass
from pathlib import Path

from drpo.cli.folder import at_server, open_run, reading, resume_flag
from drpo.cli.options import leading, overridden, parse
from drpo.cli.output import attempt, writing_folder
from drpo.errors import InputError, one_line
from drpo.lab.compare import begun, models_of
from drpo.lab.compare import compare as train_cells
from drpo.lab.crew import fitting
from drpo.lab.grid import REGIME, Grid, parse_arm, parse_regime, runs
from drpo.lab.outcome import FAILED, prepare, read_cell, read_comparison
from drpo.recipes import RECIPES, find
from drpo.report.comparison_figures import draw_curves, draw_finals
from drpo.report.comparison_page import write_comparison_report
from drpo.report.comparison_table import print_comparison
from drpo.report.progress import ComparisonConsole
from drpo.terminal import Terminal
from drpo.train.config import Run
from drpo.train.session import CONFIG, load_run


@dataclass(frozen=True)
class CompareOptions:
    """Train a recipe with several objectives, over seeds and regimes, and say what may be claimed of their differences.

      drpo compare demo --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' --seeds 0 1 2 --updates 4 16

    Every combination of the values given is a cell, a training of its own: without options 6 objectives x 3 seeds,
    which are 18 trainings, in runs/compare-RECIPE. How many there are to do is said before the first begins. Ctrl-C
    stops them, and `drpo compare --resume COMPARISON` goes on.

    Args:
        objectives: none, ppo(0.2,0.28), spo(12.5), dppo(0.15), drpo(0.2), ...; behind an @ its own learning rates,
            as in 'drpo(0.2) @ 1e-5 2e-5', so that none wins by its neighbour's tuning.
        seeds: each fixes the data order, the random numbers and the held-out problems.
        learning_rate: of the objectives that bring none of their own; without it that of --optimizer.
        task: where problems come from.
        updates: optimiser updates per rollout.
        refresh_every: steps between hand-overs of the weights to the sampler.
        lag: steps that rollouts are sampled ahead of training.
        rollout_precision: of the sampler: fp32, bf16, int8, fp8_weights, fp8.
        out: folder of the comparison; default runs/compare-RECIPE. One that is there is added to.
        jobs: cells trained at once; default: as many as memory and cores allow.
        plain: plain lines in place of the live table.
    """

    objectives: tuple[str, ...] = ("none", "ppo(0.2,0.28)", "spo(12.5)", "dppo(0.15)", "drpo(12.5)", "drpo(0.2)")
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rate: tuple[float, ...] = ()
    task: tuple[str, ...] = ()
    updates: tuple[int, ...] = ()
    refresh_every: tuple[int, ...] = ()
    lag: tuple[int, ...] = ()
    rollout_precision: tuple[str, ...] = ()
    out: Path | None = None
    jobs: int | None = None
    plain: bool = False


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with a comparison that was interrupted: its cells that have no result yet are trained.

      drpo compare --resume runs/compare-demo

    Args:
        jobs: cells trained at once; default: as many as memory and cores allow.
        plain: plain lines in place of the live table.
        own_code: import the code that the cells' configurations name as module:name; only for folders that you trust.
        engine: address of the server that the cells sample with, where they do, as their configurations have it.
    """

    jobs: int | None = None
    plain: bool = False
    own_code: bool = False
    engine: str | None = None


def compare(arguments: list[str]) -> int:
    """`drpo compare RECIPE [options]` or `drpo compare --resume COMPARISON`."""
    if arguments and arguments[0] == "--resume":
        given, rest = leading(arguments[1:], "COMPARISON", "compare --resume: name the comparison's folder")
        folder = Path(given)
        resumed = parse(ResumeOptions, rest, f"drpo compare --resume {given}")
        require_jobs(resumed.jobs)
        cells = begun(folder)
        with reading(folder):
            for cell in cells:
                run = open_run(cell, resumed.own_code)
                if at_server(run, cell, resumed.engine) != run:
                    raise InputError(f"--engine {resumed.engine}: {cell} samples with {run.engine}")
                read_cell(cell)
        with writing_folder("--resume", folder):
            return _compare(folder, cells, resumed.jobs, resumed.plain)
    name, rest = leading(arguments, "demo", f"compare: name a recipe first; known: {', '.join(RECIPES)}")
    planned_runs, options = planned(name, rest)
    folder = options.out or Path("runs") / f"compare-{name}"
    with writing_folder("--out", folder):
        if (folder / CONFIG).exists():
            raise InputError(f"--out {folder}: a single run is there; name another folder")
        return _compare(folder, prepare(folder, planned_runs), options.jobs, options.plain)


def planned(recipe: str, arguments: list[str]) -> tuple[list[Run], CompareOptions]:
    """Read a comparison from the command line: the runs of its cells, and the options besides.

    Raises:
        InputError: it cannot be read.
    """
    base, options = overridden(
        find(recipe), arguments, f"drpo compare {recipe}", CompareOptions, without=("name", "objective", "seed")
    )
    require_jobs(options.jobs)
    regimes = {field: parse_regime(field, [str(v) for v in getattr(options, field)]) for field in REGIME}
    grid = Grid(tuple(map(parse_arm, options.objectives)), options.seeds, options.learning_rate, regimes)
    return runs(base, grid), options


def require_jobs(jobs: int | None) -> None:
    """Refuse a number of jobs that cannot be."""
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: must be at least 1")


def run_cells(folder: Path, cells: list[Path], jobs: int | None, plain: bool) -> int:
    """Train cells and show it; return the exit status: 1 where one failed, 128 + n where signal n ended it."""
    console = Terminal()
    models = models_of(cells)
    crew = min((fitting(model, jobs, len(cells)) for model in models), key=lambda c: c.jobs)
    todo = [cell for cell in map(read_cell, cells) if not cell.over]
    console.print(
        f"{len(todo)} of {len(cells)} trainings to do, of {', '.join(sorted(models))}, {sum(c.steps for c in todo):,} "
        f"steps in all, in {folder}; {crew.jobs} at once with {crew.threads} thread(s) each",
        soft_wrap=True,
    )
    with ComparisonConsole(console, console.is_terminal and not plain, cells) as shown:
        comparison, signal = train_cells(folder, cells, crew, shown.tick, shown.note)
    if signal is not None:
        return 128 + signal
    return 1 if any(c.status == FAILED for c in comparison.cells) else 0


def _compare(folder: Path, cells: list[Path], jobs: int | None, plain: bool) -> int:
    status = run_cells(folder, cells, jobs, plain)
    console = Terminal()
    comparison = read_comparison(folder)
    if any(c.over for c in comparison.cells):
        print_comparison(console, comparison)
        attempt("curves", folder, lambda: draw_curves(comparison, folder / "curves.png"))
        attempt("finals", folder, lambda: draw_finals(comparison, folder / "finals.png"))
        path = attempt("report", folder, lambda: write_comparison_report(folder, comparison))
        if path is not None:
            console.print(f"report       {path}", soft_wrap=True)
        console.print(f"everything   {folder}", soft_wrap=True)
    for cell in comparison.cells:
        if cell.status == FAILED:
            console.print(one_line(f"failed: {cell.name}: {cell.reason}"), style="red", soft_wrap=True)
    if any(not c.over for c in comparison.cells):
        again = next(filter(None, (resume_flag(load_run(cell, own_code=False)) for cell in cells)), "")
        console.print(f"go on with: drpo compare --resume {folder}{again}", soft_wrap=True)
    return status
