"""`drpo eval`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers.utils import logging as transformers_logging

from drpo import models
from drpo.cli.folder import open_run
from drpo.cli.options import leading, parse
from drpo.errors import InputError
from drpo.model_names import require_there
from drpo.precision import resolve_precision
from drpo.report.console import mean_score, paired_change
from drpo.report.payload import finite
from drpo.rewards import Marking, RewardPool
from drpo.rollout import EpisodeDriver, TransformersEngine, fitting
from drpo.spelling import parse_any
from drpo.tasks import TABLE as TASKS
from drpo.tasks import Task
from drpo.terminal import Terminal
from drpo.train.config import MOST_COMPLETIONS, SPELLED, Run
from drpo.train.evaluate import evaluate, means_before_training
from drpo.train.log import EVALUATIONS, METRICS, read_records
from drpo.train.session import MODEL
from drpo.train.setup import default_device, only_fitting
from drpo.types import Sampling


@dataclass(frozen=True)
class EvalOptions:
    """Measure the accuracy of a model, or of a finished run, on held-out problems, with a 95 % interval.

      drpo eval smollm2-135m --task 'addition(1, 50)' --problems 100

    Args:
        task: held-out problems of addition(1, 50), gsm8k, records('my.jsonl', ...), ...; default: the run's own.
        reward: exact_number, math_verify, module:function; default: the task's own.
        problems: how many.
        sampling: how completions are drawn; samples is k of avg@k. Greedy and truncated laws are fine here.
        drop_long_prompts: leave out problems whose prompts are too long for the model; else one is an error.
        marking: processes and bounds of the reward, and what becomes of its failures; default: the run's own.
        precision: auto, fp32, bf16, fp16, int8, fp8_weights, fp8.
        seed: of the sampling.
        json: print the result as JSON.
        own_code: import the task and reward that a run's configuration names as module:name; only for folders that
            you trust.
    """

    task: str | None = None
    reward: str | None = None
    problems: int = 200
    sampling: Sampling = field(default_factory=lambda: Sampling(samples=1))
    drop_long_prompts: bool = False
    marking: Marking = field(default_factory=Marking)
    precision: str = "auto"
    seed: int = 0
    json: bool = False
    own_code: bool = False


def eval(arguments: list[str]) -> int:
    """`drpo eval MODEL|RUN [options]`."""
    name, rest = leading(arguments, "MODEL|RUN", "eval: name a model or a run's folder first")
    run = open_run(Path(name), own_code=False, needed=()) if (Path(name) / METRICS).exists() else None
    if run is not None and not (Path(name) / MODEL).exists():
        raise InputError(
            f"{name}: the run has not finished; `drpo train --resume {name}` goes on with it, and `drpo export` makes "
            "a model of its last checkpoint"
        )
    default = EvalOptions()
    if run is not None:
        sampling = replace(run.sampling, samples=run.eval_samples)
        default = replace(default, sampling=sampling, problems=run.eval_problems, marking=run.marking)
        default = replace(default, drop_long_prompts=run.drop_long_prompts)
    options = parse(EvalOptions, rest, f"drpo eval {name}", default)
    if not 1 <= options.problems <= MOST_COMPLETIONS:
        raise InputError(f"--problems {options.problems}: must be from 1 to {MOST_COMPLETIONS:,}")
    if run is None:
        require_there(name)
    else:
        own = ("eval_task" if run.eval_task else "task", *(() if options.reward else ("reward",)))
        run = open_run(Path(name), options.own_code, needed=() if options.task else own)
    task, reward = _examination(run, options)
    held_out = task.held_out(options.problems)
    transformers_logging.disable_progress_bar()
    model, tokenizer = models.load(str(Path(name) / MODEL) if run is not None else name)
    device = default_device()
    precision = resolve_precision(options.precision, device)
    driver = EpisodeDriver.of(TransformersEngine(model, precision=precision, device=device), model, tokenizer)
    if options.drop_long_prompts:
        held_out = only_fitting(held_out, fitting(tokenizer, driver.limits, options.sampling))
    waiting = Terminal(stderr=True).status(f"{len(held_out)} problems, {options.sampling.samples} samples of each")
    with RewardPool(reward, options.marking) as pool, waiting:
        before = _before(Path(name), options) if run is not None and options.sampling == default.sampling else {}
        result = evaluate(driver, held_out, options.sampling, pool, seed=options.seed, step=0, before=before)
    if options.json:
        print(json.dumps(finite(asdict(result))))
    else:
        _print_evaluation(name, asdict(result))
    return 0


def _examination(run: Run | None, options: EvalOptions) -> tuple[Task, Any]:
    if options.task is None and run is None:
        raise InputError(f"eval: --task is needed for a model that is not a run; known: {', '.join(TASKS)}")
    own = run and (run.eval_task or run.task)
    task: Task = own if options.task is None and own else parse_any(str(options.task), TASKS, "task")
    if options.reward is not None:
        return task, SPELLED["reward"][0](options.reward)
    return task, (run.reward if run and run.reward and options.task is None else task.reward)


def _before(folder: Path, options: EvalOptions) -> dict[str, float]:
    """What a run scored on each problem before training, where the same is asked of it now; empty where not."""
    own = options.task is None and options.reward is None
    return means_before_training(read_records(folder / EVALUATIONS)) if own else {}


def _print_evaluation(name: str, result: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    mean, interval = mean_score(result["accuracy"], result["low"], result["high"])
    table.add_row(f"avg@{result['n_samples']}", mean, interval)
    if result["difference"] is not None:
        low, high = result["difference_low"], result["difference_high"]
        value, paired = paired_change(result["difference"], low, high, shares=bool(interval))
        table.add_row("difference", value, f"from the run's step 0{paired and f'; {paired}'}")
    for k, value in result["pass_at"].items() if interval else ():
        table.add_row(f"pass@{k}", f"{value:.1%}")
    table.add_row("problems", str(result["n_problems"]))
    table.add_row("mean length", f"{result['mean_length']:.1f} tokens, {result['truncated']:.0%} truncated")
    if result["failed"]:
        table.add_row("not marked", f"{result['failed']} completions: the reward failed or abstained")
    console = Terminal()
    console.print(name, style="bold")
    console.print(table)
