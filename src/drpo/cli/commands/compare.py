"""`drpo compare`: its options."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from drpo.cli.options import leading, parse, require_options
from drpo.errors import InputError
from drpo.recipes import RECIPES, find, require_recipe
from drpo.spec import import_named
from drpo.train.records import TRIALS, refuse_old_comparison

OF_THE_RECIPE = tyro.conf.arg(help_behavior_hint="(default: the recipe's)")
BY_TRIAL = ("name", "objective", "seed")
"""Fields of a run that each trial has of its own, and that are no options."""


@dataclass(frozen=True)
class CompareOptions:
    """Train a recipe with several objectives, over seeds and regimes, and say what may be claimed of their differences.

      drpo compare demo --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' --seeds 0 1 2 --updates 4 16

    Every combination of the values given is a trial, a training of its own: without options 6 objectives x 3 seeds,
    which are 18 trainings, in runs/compare-RECIPE. How many there are to do is said before the first begins. Ctrl-C
    stops them, and `drpo compare --resume COMPARISON` goes on.

    Args:
        objectives: none, ppo(0.2,0.28), spo(12.5), dppo(0.15), drpo(0.2), ...; behind an @ its own learning rates,
            as in 'drpo(0.2) @ 1e-5 2e-5', so that none wins by its neighbour's tuning.
        seeds: each fixes the data order, the random numbers and the held-out problems.
        learning_rate: of the objectives that bring none of their own; without it that of --optimizer.
        task: where problems come from.
        updates: optimiser updates per rollout.
        sync_every: steps between weight syncs, from the trainer to the sampler.
        async_steps: steps that rollouts are sampled ahead of training.
        rollout_precision: of the sampler: fp32, bf16, int8, fp8_weights, fp8.
        out: folder of the comparison; default runs/compare-RECIPE. One that is there is added to.
        jobs: trials trained at once; default: as many as memory and cores allow.
        plain: plain lines in place of the live table.
    """

    objectives: tuple[str, ...] = ("none", "ppo(0.2,0.28)", "spo(12.5)", "dppo(0.15)", "drpo(12.5)", "drpo(0.2)")
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rate: Annotated[tuple[float, ...], OF_THE_RECIPE] = ()
    task: Annotated[tuple[str, ...], OF_THE_RECIPE] = ()
    updates: Annotated[tuple[int, ...], OF_THE_RECIPE] = ()
    sync_every: Annotated[tuple[int, ...], OF_THE_RECIPE] = ()
    async_steps: Annotated[tuple[int, ...], OF_THE_RECIPE] = ()
    rollout_precision: Annotated[tuple[str, ...], OF_THE_RECIPE] = ()
    out: Path | None = None
    jobs: int | None = None
    plain: bool = False


@dataclass(frozen=True)
class ResumeOptions:
    """Go on with a comparison that was interrupted: its trials that have no result yet are trained.

      drpo compare --resume runs/compare-demo

    Args:
        jobs: trials trained at once; default: as many as memory and cores allow.
        plain: plain lines in place of the live table.
        trust_remote_code: import the code that the trials' configurations name as module:name; only for folders that
            you trust.
        engine: address of the server that the trials sample with, where they do, as their configurations have it.
    """

    jobs: int | None = None
    plain: bool = False
    trust_remote_code: bool = False
    engine: str | None = None


def compare(arguments: list[str]) -> int:
    """`drpo compare RECIPE [options]` or `drpo compare --resume COMPARISON`."""
    if arguments and arguments[0] == "--resume":
        given, rest = leading(arguments[1:], "COMPARISON", "compare --resume: name the comparison's folder")
        resumed = parse(ResumeOptions, rest, f"drpo compare --resume {given}")
        require_jobs(resumed.jobs)
        if Path(given).is_dir():
            refuse_old_comparison(Path(given), os.listdir(given))
        if not (Path(given) / TRIALS).is_dir():
            raise InputError(f"{given}: no comparison there ({TRIALS}/ is missing)")
        return int(import_named("drpo.cli.compare", "resume", "command")(Path(given), resumed))
    name, rest = leading(arguments, "RECIPE", f"compare: name a recipe first; known: {', '.join(RECIPES)}")
    if arguments[0].startswith("-"):  # --help alone
        more = "`drpo compare RECIPE --help` shows the fields of a run besides."
        parse(CompareOptions, rest, "drpo compare RECIPE", more=more)
    require_recipe(name)
    prog = f"drpo compare {name}"
    require_options(rest, CompareOptions, prog)
    base, options = import_named("drpo.cli.overrides", "overridden", "command")(
        find(name), rest, prog, CompareOptions, without=BY_TRIAL
    )
    require_jobs(options.jobs)
    return int(import_named("drpo.cli.compare", "begin", "command")(name, base, options))


def require_jobs(jobs: int | None) -> None:
    """Refuse a number of jobs that cannot be."""
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: must be at least 1")
