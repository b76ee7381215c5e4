"""`drpo compare`: its options."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from drpo.cli.options import given, leading, parse, require_options
from drpo.errors import InputError, as_typed
from drpo.recipes import RECIPES, require_recipe
from drpo.spec import import_named
from drpo.train.records import TRIALS, refuse_old_comparison

OF_THE_RECIPE = tyro.conf.arg(help_behavior_hint="(default: the recipe's)")
NO_TUNING = tyro.conf.arg(help_behavior_hint="(default: no tuning)")
NOT_OPTIONS = ("name", "objective", "seed", "shard", "warm_up")
"""Fields of a run that are no options: those set per trial, shard, since each trial is one process, and the warm-up."""

WARM_UP_ONCE = (
    "a comparison would do it again for every trial; do it once, drpo train RECIPE --warm-up 'best_of(8)' --out RUN, "
    "and compare with --model RUN/warm_up/model"
)
"""Why a comparison has no warm-up."""


@dataclass(frozen=True)
class CompareOptions:
    """Train a recipe with several objectives, over seeds and regimes, and report which differences are significant.

      drpo compare demo --objectives 'drpo(0.2)' 'ppo(0.2,0.28)' --seeds 0 1 2 --updates 4 16

    Every combination of the given values is a trial. The default is 6 objectives x 3 seeds: 18 trainings, in
    runs/compare-RECIPE. The number of trials is printed before the first begins. Ctrl-C stops them, and `drpo compare
    --resume COMPARISON` resumes them.

    Args:
        objectives: none, ppo(0.2,0.28), spo(12.5), dppo(0.15), drpo(0.2), ...; optionally with learning rates after
            an @: 'drpo(0.2) @ 1e-5 2e-5'. Tune each objective, for a fair comparison.
        method: what all trials share, as a paper does: grpo, dapo, ppo, ...; `drpo train RECIPE --help` says what each
            sets. Its objective is the only one, unless --objectives names others.
        seeds: each fixes the data order, the random numbers and the held-out problems.
        claims: file that names in advance what may be claimed; copied to OUT/claims.toml before the first trial. What
            its seeds can decide is printed, and more seeds are trained of what is undecided.
        tuning_seeds: seeds that choose each objective's learning rate by successive halving, in OUT/tuning; they must
            not be among --seeds.
        learning_rate: for objectives without an @; default: that of --optimizer.
        task: the source of problems.
        updates: optimiser updates per rollout.
        sync_every: steps between weight syncs, from the trainer to the sampler.
        async_steps: steps that rollouts are sampled ahead of training.
        rollout_precision: of the sampler: fp32, bf16, int8, fp8_weights, fp8.
        out: folder of the comparison; default runs/compare-RECIPE. Trials are added to an existing comparison.
        jobs: trials trained at once; default: as many as memory and cores allow.
        plain: plain lines in place of the live table.
    """

    objectives: tuple[str, ...] = ("none", "ppo(0.2,0.28)", "spo(12.5)", "dppo(0.15)", "drpo(12.5)", "drpo(0.2)")
    method: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    claims: Path | None = None
    tuning_seeds: Annotated[tuple[int, ...], NO_TUNING] = ()
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
    """Resume an interrupted comparison: train its trials that have no result yet.

      drpo compare --resume runs/compare-demo

    Args:
        jobs: trials trained at once; default: as many as memory and cores allow.
        plain: plain lines in place of the live table.
        trust_remote_code: import the code that the trials' configurations name as module:name; only for folders that
            you trust.
        engine: address of the rollout server, if the trials use one; must equal the one in their configurations.
    """

    jobs: int | None = None
    plain: bool = False
    trust_remote_code: bool = False
    engine: str | None = None


def compare(arguments: list[str]) -> int:
    """`drpo compare RECIPE [options]` or `drpo compare --resume COMPARISON`."""
    if arguments and arguments[0] == "--resume":
        folder, rest = leading(arguments[1:], "COMPARISON", "compare --resume: name the comparison's folder")
        resumed = parse(ResumeOptions, rest, f"drpo compare --resume {as_typed(folder)}")
        require_jobs(resumed.jobs)
        if Path(folder).is_dir():
            refuse_old_comparison(Path(folder), os.listdir(folder))
        if not (Path(folder) / TRIALS).is_dir():
            raise InputError(f"{folder}: no comparison there ({TRIALS}/ is missing)")
        return int(import_named("drpo.cli.compare", "resume", "command")(Path(folder), resumed))
    name, rest = leading(arguments, "RECIPE", f"compare: name a recipe first; known: {', '.join(RECIPES)}")
    if arguments[0].startswith("-"):  # --help alone
        more = "`drpo compare RECIPE --help` shows the fields of a run besides."
        parse(CompareOptions, rest, "drpo compare RECIPE", more=more)
    require_recipe(name)
    prog = f"drpo compare {as_typed(name)}"
    require_options(rest, CompareOptions, prog)
    if "warm_up" in given(rest):
        raise InputError(f"--warm-up: {WARM_UP_ONCE}")
    base, options = import_named("drpo.cli.overrides", "recipe_run", "command")(
        name, rest, prog, CompareOptions, without=NOT_OPTIONS
    )
    require_jobs(options.jobs)
    if options.method is not None and "objectives" not in given(rest):
        options = replace(options, objectives=())  # the method's
    return int(import_named("drpo.cli.compare", "begin", "command")(Path(name).stem, base, options))


def require_jobs(jobs: int | None) -> None:
    """Raise unless the number of jobs is at least 1."""
    if jobs is not None and jobs < 1:
        raise InputError(f"--jobs {jobs}: must be at least 1")
