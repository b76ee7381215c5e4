"""The implementation of `drpo eval --lm-eval`: tasks of lm-eval (EleutherAI's harness), scored by its own code."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.cli.eval_options import EvalOptions
from drpo.errors import InputError, describe, nearest
from drpo.extras import missing
from drpo.model.device import choose_device
from drpo.model.precision import resolve_precision
from drpo.report.payload import finite
from drpo.terminal import Terminal

BATCH = 8
"""Texts that the harness runs through the model together."""


def evaluate_with_harness(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: EvalOptions
) -> None:
    """Score a model on tasks of lm-eval, and print the result.

    Args:
        name: of the model, or the run's folder.
        model: as it was trained, in float32; it is changed to the precision.
        tokenizer: the model's, with its chat template.
        options: the options.

    Raises:
        InputError: lm-eval is not installed, has no such task, or fails.
    """
    harness, manager = _harness(options)
    device = choose_device(options.device)
    model = model.to(device, resolve_precision(options.precision, device).dtype)
    seeds = {f"{whose}random_seed": options.seed for whose in ("", "numpy_", "torch_", "fewshot_")}
    try:
        with Terminal(stderr=True).status(f"{len(options.lm_eval)} tasks of lm-eval"):
            results = harness.simple_evaluate(
                model=harness.models.huggingface.HFLM(
                    pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device=str(device)
                ),
                tasks=list(options.lm_eval),
                task_manager=manager,
                limit=options.problems,
                apply_chat_template=options.lm_eval_chat,
                log_samples=False,
                **seeds,
            )
    except Exception as error:  # tasks fetch data and run code of their own
        raise InputError(f"--lm-eval {' '.join(options.lm_eval)}: lm-eval failed: {describe(error)}") from None
    if options.json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        print(json.dumps(finite({key: results[key] for key in kept if key in results})))
    else:
        _print_results(name, results, options)


def _harness(options: EvalOptions) -> tuple[Any, Any]:
    """Return the library, and what knows its tasks."""
    try:
        import lm_eval.models.huggingface  # noqa: PLC0415 (an optional backend)
        import lm_eval.tasks  # noqa: PLC0415 (an optional backend)
    except ImportError as error:
        raise InputError(f"--lm-eval: {missing(error) or describe(error)}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = options.lm_eval_folder
    if folder is not None and not folder.is_dir():
        raise InputError(f"--lm-eval-folder {folder}: no such folder")
    manager = lm_eval.tasks.TaskManager(include_path=None if folder is None else str(folder))
    for task in options.lm_eval:
        if not manager.match_tasks([task]):
            close = nearest(task, manager.all_tasks)
            told = close if "did you mean" in close else "; `lm-eval ls tasks` lists them"
            raise InputError(f"--lm-eval {task}: lm-eval has no such task{told}")
    return lm_eval, manager


def rows(results: dict[str, Any]) -> Iterator[Sequence[str]]:
    """Yield task, metric, its value and its standard error, of every metric of every task.

    Args:
        results: of the harness.

    Example:
        >>> list(rows({"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1}}}))
        [('t', 'acc', '0.5000', '0.1000')]
    """
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, float | int):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            yield task, label, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""


def _print_results(name: str, results: dict[str, Any], options: EvalOptions) -> None:
    table = Table("task", "metric", "value", "standard error", box=None, pad_edge=False, header_style="bold")
    for row in rows(results):
        table.add_row(*row)
    console = Terminal()
    console.print(name, style="bold")
    console.print(table)
    for task, counts in results.get("n-samples", {}).items():
        if counts["effective"] < counts["original"]:
            console.print(f"{task}: the first {counts['effective']} of {counts['original']} problems (--problems)")
    if not options.lm_eval_chat:
        console.print("prompts are plain texts; --lm-eval-chat puts them through the chat template")
