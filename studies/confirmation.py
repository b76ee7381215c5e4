"""What the small world decided, asked again of SmolLM2-135M: the confirmation of docs/regions.md.

    python studies/confirmation.py power             what the registered claims can decide
    python studies/confirmation.py run               train what is missing; Ctrl-C stops it, the same command resumes
    python studies/confirmation.py decide            the verdicts so far

Each run is `drpo train demo` in a process of its own: 16 steps of 8 prompts x 8 samples, 8 updates of each rollout, the
sampler's weights in e4m3, as docs/study.md has them. Finished runs are lines of results/confirmation.jsonl, so that the
study may take many days and machines; `--part 0 --parts 2` and `--part 1 --parts 2` share it between two. What may be
claimed is in results/confirmation.claims.toml, which was committed before the first run. The doctor is not asked: it
refuses the clip here, which 19 % of the tokens leave before the first update, and that is what is compared.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import study_runs
from command import run as run_command
from drpo.errors import InputError
from drpo.lab.claims import Decision, decide
from drpo.lab.looks import power_lines
from drpo.lab.statistics import t_interval
from drpo.lab.trial_result import Comparison
from drpo.train.records import CHECKPOINTS, ENVIRONMENT, METRICS, SUMMARY, read_json, read_records
from drpo.train.stored import complete
from drpo.train.verify import is_finished
from markdown_tables import markdown
from study_runs import Record, Records, StudyRun, line_of, plans, read, spec_of, trial_name

RESULTS = Path(__file__).resolve().parent / "results"
RECORDS = RESULTS / "confirmation.jsonl"
CLAIMS = RESULTS / "confirmation.claims.toml"
CLIP = "ppo(0.2, 0.28)"
OBJECTIVES = ("none", CLIP, "dppo(0.2)", "drpo(0.6)")
"""No region, the clip, and the mask and the radius that did best in the small world."""
TASKS = {
    "addition": (),
    "chain_sum": (
        "--task",
        'reasoning_gym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, system=None)',
        "--reward",
        "exact_number",
    ),
}
RATES = {"stale": 2e-5, "stale, cool": 1e-5}
"""The demo's rate and half of it: the small world decided nothing for or against regions at half its rates."""
SEEDS = tuple(range(8))
STEPS = 16
SETTINGS = (
    *("--prompts", "8", "--steps", str(STEPS), "--updates", "8", "--rollout-precision", "fp8_weights"),
    *("--schedule", "constant", "--sampling.max-new-tokens", "16", "--eval-problems", "200", "--eval-every", "0"),
    "--no-doctor",
)


def planned() -> list[StudyRun]:
    """Return all runs, by seed, then by task and rate: a comparison's runs stand together."""
    cells = product(SEEDS, TASKS, RATES.items(), OBJECTIVES)
    return [StudyRun(f"{task}, {name}", spec_of(o), rate, seed) for seed, task, (name, rate), o in cells]


def command(cell: StudyRun, folder: Path) -> list[str]:
    """Return what trains a run, without `drpo`."""
    task, _, _ = cell.regime.partition(",")
    options = ["--objective", cell.objective, "--learning-rate", repr(cell.rate), "--seed", str(cell.seed)]
    return ["train", "demo", *options, *TASKS[task], *SETTINGS, "--plain", "--out", str(folder)]


def next_command(cell: StudyRun, folder: Path) -> list[str]:
    """Return what goes on with a run from its last checkpoint, or begins it anew where there is none."""
    if complete(folder / CHECKPOINTS):
        return ["train", "--resume", str(folder), "--no-doctor", "--plain"]
    shutil.rmtree(folder, ignore_errors=True)
    return command(cell, folder)


def train(cell: StudyRun, folder: Path) -> Record:
    """Train a run in a process of its own, going on with what is in its folder; return what is kept of it.

    A run that learnt nothing has a status of its own, but has finished and counts.

    Raises:
        InputError: it failed.
    """
    if not is_finished(folder):
        status = status_of([sys.executable, "-m", "drpo", *next_command(cell, folder)])
        if not is_finished(folder):
            raise InputError(f"--out {folder}: {trial_name(cell)} ended with status {status}; its last lines say why")
    summary, machine = read_json(folder / SUMMARY), read_json(folder / ENVIRONMENT)
    return {
        **vars(cell),
        "start": summary["evaluation_before"]["reward_mean"],
        "end": summary["evaluation_after"]["reward_mean"],
        "reward": [round(step["reward_mean"], 6) for step in read_records(folder / METRICS)],
        "seconds": round(summary["training_seconds"]),
        "processor": machine["processor"],
    }


def status_of(arguments: Sequence[str]) -> int:
    """Run a program; Ctrl-C reaches it too, and what it then still writes is waited for."""
    process = subprocess.Popen(arguments)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def comparison(records: Records) -> Comparison:
    """Return the study so far."""
    return study_runs.comparison("confirmation", lambda _: STEPS, records, planned())


def run_study(out: Path, until: float, part: int = 0, parts: int = 1) -> bool:
    """Train what is missing of a part of the study, seed by seed; return whether all of that part are there.

    Args:
        out: folder of the runs that are not finished.
        until: no run begins after this time.
        part: which of the plan's runs: those at part, part + parts, ...
        parts: how many processes, here or on other machines, share the plan.
    """
    for cell in planned()[part::parts]:
        if cell in read(RECORDS):
            continue
        if time.time() > until:
            return False
        folder = out / "".join(c if c.isalnum() else "_" for c in trial_name(cell))
        record = train(cell, folder)
        with RECORDS.open("a", encoding="utf-8") as file:  # at once: a line is there or it is not
            file.write(json.dumps(record) + "\n")
        shutil.rmtree(folder)
    return True


def decisions() -> dict[str, list[Decision]]:
    """Return what every family came to."""
    everything = comparison(read(RECORDS))
    return {name: decide(plan, everything) for name, plan in plans(CLAIMS).items()}


def table() -> str:
    """Return the page's table: where the runs ended, and how far from the clip's run of the same seed."""
    records, rows = read(RECORDS), []
    for regime, objective in dict.fromkeys((cell.regime, cell.objective) for cell in planned()):
        of = {c.seed: r["end"] for c, r in records.items() if (c.regime, c.objective) == (regime, objective)}
        clip = {c.seed: r["end"] for c, r in records.items() if (c.regime, c.objective) == (regime, spec_of(CLIP))}
        apart = [of[seed] - clip[seed] for seed in of if seed in clip]
        shown = "-"
        if objective != spec_of(CLIP) and len(apart) > 1:
            size = t_interval([apart])
            shown = f"{100 * size.value:+.0f} ({100 * size.low:+.0f} to {100 * size.high:+.0f})"
        rows.append(
            [regime, f"`{objective}`", f"{len(of)} of {len(SEEDS)}", f"{fmean(of.values()):.0%}" if of else "-", shown]
        )
    head = [
        "regime",
        "objective",
        "runs",
        "held-out accuracy, mean",
        "points above the clip, same seeds (95 % t, not corrected)",
    ]
    return markdown(head, rows)


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands; return the exit status: 1 where runs are left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("power", "run", "decide"))
    parser.add_argument("--minutes", type=float, default=600.0, help="no run begins after that")
    parser.add_argument("--out", type=Path, default=Path("runs/confirmation"), help="folder of unfinished runs")
    parser.add_argument("--part", type=int, default=0, help="train only the runs PART, PART + PARTS, ... of the plan")
    parser.add_argument("--parts", type=int, default=1, help="how many processes or machines share the plan")
    options = parser.parse_args(arguments)
    if not 0 <= options.part < options.parts:
        raise InputError(f"--part {options.part}: must be at least 0 and below --parts {options.parts}")
    if options.what == "power":
        waiting = comparison({})
        print("\n".join(f"{n}: {line}" for n, plan in plans(CLAIMS).items() for line in power_lines(plan, waiting)))
    elif options.what == "run":
        until = time.time() + 60 * options.minutes
        return 0 if run_study(options.out, until, options.part, options.parts) else 1
    else:
        print(table())
        print(f"{len(read(RECORDS))} of {len(planned())} runs are there")
        for name, of_family in decisions().items():
            print("\n".join(line_of(name, plans(CLAIMS)[name], d) for d in of_family))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
