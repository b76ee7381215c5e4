"""The implementation of `drpo eval`."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers.utils import logging as transformers_logging

from drpo.cli.eval_options import EvalOptions
from drpo.cli.inspect_tasks import evaluate_with_inspect
from drpo.cli.lm_harness import evaluate_with_harness
from drpo.cli.template_options import read_template
from drpo.errors import InputError, printable
from drpo.model import loading
from drpo.model.device import choose_device
from drpo.model.precision import resolve_precision
from drpo.report.payload import finite
from drpo.report.words import mean_score, paired_change
from drpo.rewards import REGISTRY as REWARDS
from drpo.rewards import RewardPool
from drpo.rewards.usage import PREFIX
from drpo.rollout import EpisodeDriver, TransformersEngine, fitting
from drpo.rollout.template_settings import set_template
from drpo.spec import parse_spec
from drpo.tasks import REGISTRY as TASKS
from drpo.tasks import Task
from drpo.terminal import Terminal
from drpo.train.config import Run
from drpo.train.evaluate import before_training, examine, summed_up
from drpo.train.metrics import endpoint_metrics
from drpo.train.records import EVALUATIONS, MODEL, read_records
from drpo.train.setup import environments_of, episode_limits, only_fitting


def eval(name: str, run: Run | None, options: EvalOptions, as_trained: bool) -> int:
    """Score a model, or a finished run, on held-out problems, and print the result.

    Args:
        name: of the model, or the run's folder.
        run: the folder's run; None for a model.
        options: the options.
        as_trained: whether completions are sampled as in the run's evaluations.
    """
    transformers_logging.disable_progress_bar()
    folder = str(Path(name) / MODEL) if run is not None else name
    if options.lm_eval:
        evaluate_with_harness(name, *loading.load(folder), options)
        return 0
    if options.inspect:
        evaluate_with_inspect(name, folder, options)
        return 0
    task, reward = _examination(name, run, options)
    held_out = task.held_out(options.problems)
    model, tokenizer = loading.load(folder)
    template = None if options.chat_template is None else read_template(options.chat_template)
    set_template(tokenizer, template, options.template)
    device = choose_device(options.device)
    precision = resolve_precision(options.precision, device)
    engine = TransformersEngine(model, precision=precision, device=device)
    driver = EpisodeDriver.of(engine, model, tokenizer, options.stop)
    environments = environments_of(task, run or Run())
    driver = replace(driver, environments=environments, episode_limits=episode_limits(run or Run()))
    if options.drop_long_prompts:
        held_out = only_fitting(held_out, fitting(tokenizer, driver.limits, options.sampling))
    waiting = Terminal(stderr=True).status(f"{len(held_out)} problems, {options.sampling.samples} samples of each")
    with RewardPool(reward, options.reward_pool) as pool, environments or nullcontext(), waiting:
        before, n_before = _before(Path(name), options) if run is not None and as_trained else ({}, None)
        step = 0 if run is None else run.trainer.steps  # a finished run's model
        groups = examine(driver, held_out, options.sampling, pool, seed=options.seed)
    result = summed_up(groups, options.sampling.samples, step=step, before=before, n_before=n_before)
    if options.json:
        print(json.dumps(finite(asdict(result) | endpoint_metrics(groups))))
    else:
        _print_evaluation(name, asdict(result), endpoint_metrics(groups))
    return 0


def _examination(name: str, run: Run | None, options: EvalOptions) -> tuple[Task, Any]:
    if options.task is None and run is None:
        raise InputError(
            f"eval: {name} is no run's folder, and a model needs a --task; known: {', '.join(TASKS.entries)}"
        )
    run_task = run and (run.evaluation.task or run.data.task)
    task: Task = run_task if options.task is None and run_task else parse_spec(str(options.task), TASKS)
    if options.reward is not None:
        return task, parse_spec(options.reward, REWARDS)
    return task, (run.rewards.function if run and run.rewards.function and options.task is None else task.reward)


def _before(folder: Path, options: EvalOptions) -> tuple[dict[str, float], int | None]:
    """Return `before_training` of a run; no means if task or reward differ from the run's."""
    same = options.task is None and options.reward is None
    return before_training(read_records(folder / EVALUATIONS) if same else [])


def _print_evaluation(name: str, result: Mapping[str, Any], endpoints: Mapping[str, float]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    mean, interval = mean_score(result["reward_mean"], result["low"], result["high"])
    table.add_row(f"avg@{result['n_samples']}", mean, interval)
    if result["difference"] is not None:
        low, high = result["difference_low"], result["difference_high"]
        value, paired = paired_change(result["difference"], low, high, shares=bool(interval))
        table.add_row("difference", value, f"from the run's step 0{paired and f'; {paired}'}")
    for k, value in result["pass_at"].items() if interval else ():
        table.add_row(f"pass@{k}", f"{value:.1%}")
    for part, value in result["reward_parts"].items():
        table.add_row(printable(part), f"{value:.3g}")
    table.add_row("problems", str(result["n_problems"]))
    table.add_row("mean length", f"{result['mean_length']:.1f} tokens, {result['truncated']:.0%} truncated")
    if result["failed"]:
        table.add_row("not scored", f"{result['failed']} completions: the reward failed or abstained")
    if endpoints:
        asked = ", ".join(f"{n:,.0f} {key.removeprefix(PREFIX).replace('_', ' ')}" for key, n in endpoints.items() if n)
        table.add_row("endpoint", asked)
    console = Terminal()
    console.print(name, style="bold")
    console.print(table)
