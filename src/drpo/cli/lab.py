"""`drpo lab`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from drpo.cli.compare import require_jobs, run_cells
from drpo.cli.options import parse
from drpo.cli.output import attempt, writing_folder
from drpo.lab.compare import release
from drpo.lab.outcome import prepare, read_comparison
from drpo.lab.stability import KINDS, LEARNING_RATES, OBJECTIVES, PRECISIONS, UPDATES, stability_runs
from drpo.lab.tail import Tail
from drpo.report.comparison_page import write_comparison_report
from drpo.report.comparison_table import print_comparison
from drpo.report.maps import draw_maps
from drpo.terminal import Terminal
from drpo.train.config import SPELLED

STABILITY = "stability"
TITLES = {
    "noise": "the tail is noise: the reward looks at common words alone",
    "meaning": "the tail carries meaning: the reward looks at rare words alone",
}


@dataclass(frozen=True)
class LabOptions:
    """See which trust region holds: the stability benchmark, a tiny transformer over a long-tailed vocabulary.

      drpo lab --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' --rollout-precision fp32

    There are two tasks, which differ in whether rare words are noise or carry the meaning. Every combination of what is
    given is a cell, a training of seconds: without options 288 of them, in runs/lab, minutes on two cores.

    Args:
        objectives: none, ppo(0.2,0.28), spo(3), dppo(0.15), drpo(12.5), drpo(0.2), ...; behind an @ its own learning
            rates.
        seeds: of each.
        updates: optimiser updates per rollout: how stale the data get.
        learning_rate: of each.
        rollout_precision: of the sampler, beside a trainer in fp32: fp32, bf16, int8, fp8_weights, fp8.
        out: folder; what is there already is not done again.
        jobs: cells trained at once; default: one a core.
        plain: plain lines in place of the live table.
    """

    objectives: tuple[str, ...] = OBJECTIVES
    seeds: tuple[int, ...] = (0, 1)
    updates: tuple[int, ...] = UPDATES
    learning_rate: tuple[float, ...] = LEARNING_RATES
    rollout_precision: tuple[str, ...] = PRECISIONS
    out: Path = Path("runs/lab")
    jobs: int | None = None
    plain: bool = False


def lab(arguments: list[str]) -> int:
    """`drpo lab [options]`: the stability benchmark, with maps."""
    options = parse(LabOptions, arguments, "drpo lab")
    require_jobs(options.jobs)
    folder = options.out / STABILITY
    cells = stability_runs(
        options.objectives, options.seeds, options.updates, options.learning_rate, options.rollout_precision
    )
    console = Terminal()
    with writing_folder("--out", options.out):
        status = run_cells(folder, prepare(folder, cells), options.jobs, options.plain)
    release(folder)
    comparison = read_comparison(folder)
    if not any(c.over for c in comparison.cells):
        return status
    print_comparison(console, comparison, best_only=True)
    for kind in KINDS:
        path = options.out / f"stability_{kind}.png"
        drawn = partial(draw_maps, comparison, SPELLED["task"][1](Tail(kind)), TITLES[kind], path)
        if attempt("map", folder, drawn) is not None:
            console.print(f"map          {path}", soft_wrap=True)
    page = attempt("report", folder, lambda: write_comparison_report(folder, comparison))
    if page is not None:
        console.print(f"report       {page}", soft_wrap=True)
    return status
