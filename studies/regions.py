"""Which trust region holds, where: the study of docs/regions.md, on the small world.

    python studies/regions.py power            what the registered claims can decide
    python studies/regions.py tune             a learning rate per objective, on seeds that are not reported
    python studies/regions.py run              train what is missing; Ctrl-C stops it, the same command resumes
    python studies/regions.py decide           the verdicts
    python studies/regions.py repeat           train a part again and compare its verdicts with the committed ones

There are two studies: `regions`, and `regions_more` (`--study regions_more`), which was registered when the first was
finished: objectives and regimes that it lacked, on seeds of its own. Finished runs are lines of results/STUDY.jsonl,
those that chose the rates of results/STUDY_tuning.jsonl. What may be claimed is in results/STUDY.claims.toml, which was
committed before the first reported run of its study.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

import study_runs
from command import run as run_command
from drpo.errors import InputError
from drpo.lab.claims import Decision, decide
from drpo.lab.grid import Variant
from drpo.lab.halving import halved, seeds_per_round
from drpo.lab.looks import due, power_lines
from drpo.lab.trial_result import Comparison
from small_world import Regime, Run, World, speaker, train
from study_runs import Records, StudyRun, line_of, objective_of, plans, read, spec_of, trial_name, verdict

RESULTS = Path(__file__).resolve().parent / "results"
REJECTION = "none*reject('seq_mean_k3', 0.05)"
REGIMES: Mapping[str, Regime] = {
    "stale 8": Regime(updates=8),
    "stale 8, hot": Regime(updates=8, heat=2.0),
    "stale 8, cool": Regime(updates=8, heat=0.5),
    "stale 24": Regime(updates=24),
    "mixture": Regime(World(experts=4), updates=8, precision="fp8_weights", router="bf16"),
    "peaked": Regime(World(sharp=True), updates=8),
    "turn": Regime(World(turn=True), updates=8),
    "fp8": Regime(updates=2, precision="fp8_weights"),
    "stale 24, cool": Regime(updates=24, heat=0.5),
    "int8": Regime(updates=2, precision="int8"),
    "mixture, cold": Regime(World(experts=4), updates=8, precision="fp8_weights", router="bf16", heat=0.25),
    "mixture, cold, replayed": Regime(
        World(experts=4), updates=8, precision="fp8_weights", router="bf16", replay=True, heat=0.25
    ),
}
"""By their names on the page."""
TUNED_ON = ("stale 8",)
"""Regimes whose pilot runs choose the learning rates, which the other regimes then have to bear."""
SAME_RATE = {"drpo(12.5)": "none"}
"""Objectives that take another one's rate, so that their comparison is of the objective alone."""
RATES = (2.5e-3, 5e-3, 1e-2)
PILOT = (1000,)
"""Seeds that choose the rates, and are not reported."""
BATCH = 30
"""Runs trained side by side."""


@dataclass(frozen=True)
class Study:
    """A registered study: objectives in regimes.

    Args:
        name: of its files.
        regimes: of `REGIMES`, the most decisive first: runs are trained in this order.
        tiers: objectives, those first that are trained first.
        seeds: those of all looks.
    """

    name: str
    regimes: tuple[str, ...]
    tiers: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        """All of them, in their order."""
        return tuple(name for tier in self.tiers for name in tier)

    @property
    def records(self) -> Path:
        """The finished runs."""
        return RESULTS / f"{self.name}.jsonl"

    @property
    def tuning(self) -> Path:
        """The runs that chose the rates."""
        return RESULTS / f"{self.name}_tuning.jsonl"

    @property
    def claims(self) -> Path:
        """What may be claimed."""
        return RESULTS / f"{self.name}.claims.toml"


FIRST = Study(
    "regions",
    ("stale 8", "stale 8, hot", "stale 8, cool", "stale 24", "mixture", "peaked", "turn", "fp8"),
    (
        ("none", "drpo(12.5)", "ppo(0.2, 0.28)", "dppo(0.2)", "drpo(0.2)", "tis(2)"),
        ("drpo(0.2, outside=0.2)", "brake:Brake(0.2)"),
        ("drpo(0.05)", "drpo(0.6)", "cppo", "icepop", "gspo"),
    ),
    tuple(range(20)),
)
MORE = Study(
    "regions_more",
    (
        "stale 24",
        "stale 8",
        "stale 8, hot",
        "stale 8, cool",
        "stale 24, cool",
        "mixture, cold",
        "mixture, cold, replayed",
        "int8",
    ),
    (("none", "ppo(0.2, 0.28)", "dppo(0.2)", "drpo(0.6)", "drpo(0.2)", "spo(0.2)", "ipo(0.3)", "cispo", REJECTION),),
    tuple(range(20, 60)),
)
STUDIES = {study.name: study for study in (FIRST, MORE)}


def train_cells(path: Path, cells: Iterable[StudyRun], until: float, threads: int = 1) -> bool:
    """Train the cells that a file lacks, batch by batch, and append each batch to it.

    Args:
        path: of the records.
        cells: in the order of training; those of one regime stand together.
        until: no batch begins after this time.
        threads: batches at once.

    Returns:
        Whether all are there.
    """
    there = read(path)
    missing = [cell for cell in dict.fromkeys(cells) if cell not in there]
    if missing and time.time() > until:
        return False
    batches: list[tuple[str, list[StudyRun]]] = []
    for regime in dict.fromkeys(cell.regime for cell in missing):
        of_regime = [cell for cell in missing if cell.regime == regime]
        batches += [(regime, of_regime[first : first + BATCH]) for first in range(0, len(of_regime), BATCH)]
        speaker(REGIMES[regime].world)

    def begin(batch: tuple[str, list[StudyRun]]) -> bool:
        if time.time() > until:
            return False
        lines = _trained(*batch)
        with path.open("a", encoding="utf-8") as file:  # at once: a line is there or it is not
            file.write("".join(line + "\n" for line in lines))
        return True

    with ThreadPoolExecutor(threads) as pool:
        return all(list(pool.map(begin, batches)))


def _trained(regime: str, cells: Sequence[StudyRun]) -> list[str]:
    """Train cells of one regime side by side; return their records."""
    began, spent = time.time(), time.thread_time()
    cells = sorted(cells, key=lambda cell: (cell.objective, cell.rate, cell.seed))
    curves = train(REGIMES[regime], [Run(objective_of(c.objective), c.rate, c.seed) for c in cells])
    columns = {"start": curves.start, "end": curves.end, "reward": curves.reward, **curves.figures}
    took = f"{time.thread_time() - spent:.0f} s of processor, {time.time() - began:.0f} s of clock"
    print(f"{regime}: {len(cells)} runs, {took}", flush=True)
    return [
        json.dumps({**vars(cell), **{name: _rounded(column[i].tolist()) for name, column in columns.items()}})
        for i, cell in enumerate(cells)
    ]


def _rounded(x: Any) -> Any:
    return [_rounded(v) for v in x] if isinstance(x, list) else float(f"{x:.4g}")


def comparison(records: Records, planned: Iterable[StudyRun] = ()) -> Comparison:
    """Return finished runs, and planned ones that wait, as a comparison whose tasks are the regimes."""
    return study_runs.comparison("regions", lambda regime: REGIMES[regime].steps, records, planned)


def tune(study: Study, until: float, threads: int = 1) -> dict[str, float] | None:
    """Return each objective's rate, by successive halving over `TUNED_ON`; None if the time is over before."""
    tuned = [o for o in study.objectives if o not in SAME_RATE]
    variants = [Variant(objective_of(o), RATES) for o in tuned]
    for n in seeds_per_round(len(RATES), len(PILOT)):
        seeds = PILOT[:n]
        named = list(zip(map(spec_of, tuned), variants, strict=True))
        cells = [
            StudyRun(r, o, rate, s) for r in TUNED_ON for s in seeds for o, v in named for rate in v.learning_rates
        ]
        if not train_cells(study.tuning, cells, until, threads):
            return None
        variants = halved(variants, comparison(read(study.tuning)), seeds)
    rates = {spec_of(o): v.learning_rates[0] for o, v in zip(tuned, variants, strict=True)}
    return rates | {spec_of(o): rates[spec_of(SAME_RATE[o])] for o in study.objectives if o in SAME_RATE}


@lru_cache
def rates(study: Study) -> dict[str, float]:
    """Return the rates that the committed tuning runs chose."""
    chosen = tune(study, until=0.0)
    if chosen is None:
        raise InputError(f"{study.tuning.name}: runs are missing; python studies/regions.py tune --study {study.name}")
    return chosen


def planned(study: Study) -> list[StudyRun]:
    """Return the cells of the study, by regime, then by seed."""
    return [StudyRun(r, o, rate, s) for r, s, (o, rate) in product(study.regimes, study.seeds, rates(study).items())]


def decisions(study: Study, records: Records) -> dict[str, list[Decision]]:
    """Return what every family came to."""
    everything = comparison(records, planned(study))
    return {name: decide(plan, everything) for name, plan in plans(study.claims).items()}


def run_study(study: Study, until: float, threads: int) -> bool:
    """Train what each look has: first seeds of all, then more of what is undecided; tier by tier, by regime."""
    families, cells = plans(study.claims).values(), planned(study)
    looks = sorted({n for plan in families for n in plan.seeds})
    for n, tier, regime in product(looks, study.tiers, study.regimes):
        everything = comparison(read(study.records), cells)
        names = frozenset().union(*(due(plan, everything) for plan in families))
        of_tier = [c for c in cells if c.regime == regime and c.objective in map(spec_of, tier)]
        wanted = [c for c in of_tier if c.seed in study.seeds[:n] and trial_name(c) in names]
        if not train_cells(study.records, wanted, until, threads):
            return False
    return True


def power(study: Study) -> list[str]:
    """Say what each family can decide."""
    waiting = comparison({}, planned(study))
    return [f"{name}: {line}" for name, plan in plans(study.claims).items() for line in power_lines(plan, waiting)]


PART = ("stale 8, cool", "stale 8, hot"), FIRST.tiers[0]
"""Regimes and objectives of the first study that `repeat` trains again."""


def repeat(path: Path, until: float, threads: int) -> bool:
    """Train a part of the first study again, and say whether its verdicts are the committed ones.

    Args:
        path: of the new records.
        until: no batch begins after this time.
        threads: batches at once.
    """
    committed = read(FIRST.records)
    regimes, objectives = PART[0], set(map(spec_of, PART[1]))
    cells = [cell for cell in committed if cell.regime in regimes and cell.objective in objectives]
    if not train_cells(path, cells, until, threads):
        return False
    new = read(path)
    same = True
    for (name, before), after in zip(
        decisions(FIRST, committed).items(),
        decisions(FIRST, committed | {c: new[c] for c in cells}).values(),
        strict=True,
    ):
        for old, again in zip(before, after, strict=True):
            of_part = {old.contrast.of, old.contrast.against} <= objectives
            if of_part and {stratum[0][0] for stratum in old.contrast.strata} <= set(regimes):
                equal = verdict(old) == verdict(again)
                same = same and equal
                print(
                    f"{line_of(name, plans(FIRST.claims)[name], again)} | {'as committed' if equal else verdict(old)}"
                )
    return same


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("power", "tune", "run", "decide", "repeat"))
    parser.add_argument("--study", choices=STUDIES, default=FIRST.name, help="which one; repeat is of the first")
    parser.add_argument("--minutes", type=float, default=600.0, help="no batch of runs begins after that")
    parser.add_argument("--threads", type=int, default=1, help="batches trained at once")
    parser.add_argument("--out", type=Path, default=Path("runs/regions.jsonl"), help="file of repeat")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    until = time.time() + 60 * options.minutes
    study = STUDIES[options.study]
    if options.what == "power":
        print("\n".join(power(study)))
    elif options.what == "tune":
        print(tune(study, until, options.threads))
    elif options.what == "run":
        return 0 if run_study(study, until, options.threads) else 1
    elif options.what == "repeat":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        return 0 if repeat(options.out, until, options.threads) else 1
    else:
        for name, of_family in decisions(study, read(study.records)).items():
            print("\n".join(line_of(name, plans(study.claims)[name], d) for d in of_family))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
