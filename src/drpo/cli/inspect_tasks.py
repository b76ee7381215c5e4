"""The implementation of `drpo eval --inspect`: tasks of inspect (UK AI Security Institute), run by its own code."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from drpo.cli.eval_options import EvalOptions
from drpo.errors import InputError, describe, one_line
from drpo.extras import missing
from drpo.model import external, loading
from drpo.model.device import choose_device
from drpo.model.names import SMOLLM2
from drpo.model.precision import resolve_precision
from drpo.model.saving import save_model
from drpo.model.smollm2 import smollm2
from drpo.report.payload import finite
from drpo.terminal import Terminal
from drpo.types import Sampling


def evaluate_with_inspect(name: str, folder: str, options: EvalOptions) -> None:
    """Score a model on tasks of inspect, and print the result.

    Args:
        name: of the model, or the run's folder.
        folder: the model's name for `drpo.model.loading.load`.
        options: the options.

    Raises:
        InputError: inspect is not installed, has no such task, or a task failed.
    """
    inspect = _inspect()
    device = choose_device(options.device)
    asked = f"--inspect {' '.join(options.inspect)}"
    with TemporaryDirectory() as scratch:
        try:
            model = inspect.model.get_model(
                f"hf/{name}",
                config=inspect.model.GenerateConfig(**generate_config(options.sampling), seed=options.seed),
                memoize=False,
                model_path=plain_folder(folder, Path(scratch) / "model"),
                device=str(device),
                dtype=resolve_precision(options.precision, device).dtype,
                do_sample=options.sampling.temperature > 0,
            )
            with Terminal(stderr=True).status(f"{len(options.inspect)} tasks of inspect"):
                logs = inspect.eval(
                    list(options.inspect),
                    model=model,
                    limit=options.problems,
                    epochs=options.sampling.samples,
                    log_dir=str(options.inspect_logs or Path(scratch) / "logs"),
                    display="none",
                    log_level="error",
                    ctl_server=False,
                )
        except InputError:
            raise
        except Exception as error:  # tasks fetch data and run code of their own
            raise InputError(f"{asked}: inspect failed: {describe(error)}") from None
    for log in logs:
        if log.status != "success":
            told = log.error.message if log.error else log.status
            raise InputError(f"--inspect {log.eval.task}: inspect failed: {one_line(told)}")
    if not logs:
        raise InputError(f"{asked}: inspect found no such task; name a file, my_task.py@name, or inspect_evals/NAME")
    results = {log.eval.task: summary_of(log) for log in logs}
    if options.json:
        print(json.dumps(finite({"results": results})))
    else:
        _print_results(name, results)


def _inspect() -> Any:
    try:
        import inspect_ai.model  # noqa: PLC0415 (an optional backend)
    except ImportError as error:
        raise InputError(f"--inspect: {missing(error) or describe(error)}") from None
    return inspect_ai


def generate_config(sampling: Sampling) -> dict[str, Any]:
    """Return what inspect samples with where a task does not say: its GenerateConfig's arguments.

    Args:
        sampling: of the options; a temperature of 0 is greedy, which inspect's code for transformers has apart.

    Example:
        >>> generate_config(Sampling(max_new_tokens=8))
        {'max_tokens': 8, 'temperature': 1.0, 'top_p': 1.0, 'top_k': 0}
        >>> generate_config(Sampling(max_new_tokens=8, temperature=0))
        {'max_tokens': 8}
    """
    config: dict[str, Any] = {"max_tokens": sampling.max_new_tokens}
    if sampling.temperature > 0:
        config |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return config


def plain_folder(name: str, scratch: Path) -> str:
    """Return a folder that transformers reads alone, where the model already is one; else write one.

    Args:
        name: as for `drpo.model.loading.load`.
        scratch: the folder to write.
    """
    folder = Path(smollm2() if name == SMOLLM2 else name)
    if (folder / "config.json").is_file() and external.base_of(folder) is None and any(folder.glob("*.safetensors")):
        return str(folder)
    save_model(*loading.load(name), scratch)
    return str(scratch)


def summary_of(log: Any) -> dict[str, Any]:
    """Return the scores of a task's log: scorer -> metric -> value; and how many samples they are of.

    Args:
        log: an `inspect_ai.log.EvalLog` that succeeded.
    """
    scores = {score.name: {name: m.value for name, m in score.metrics.items()} for score in log.results.scores}
    return {"scores": scores, "samples": log.results.completed_samples, "of": log.eval.dataset.samples}


def rows(results: dict[str, Any]) -> Iterator[Sequence[str]]:
    """Yield task, scorer, metric and value, of every metric of every task.

    Example:
        >>> list(rows({"t": {"scores": {"match": {"accuracy": 0.5, "stderr": 0.1}}}}))
        [('t', 'match', 'accuracy', '0.5000'), ('t', 'match', 'stderr', '0.1000')]
    """
    for task, result in results.items():
        for scorer, metrics in result["scores"].items():
            for metric, value in metrics.items():
                yield task, scorer, metric, f"{value:.4f}"


def _print_results(name: str, results: dict[str, Any]) -> None:
    table = Table("task", "scorer", "metric", "value", box=None, pad_edge=False, header_style="bold")
    for row in rows(results):
        table.add_row(*row)
    console = Terminal()
    console.print(name, style="bold")
    console.print(table)
    for task, result in results.items():
        console.print(f"{task}: {result['samples']} samples, of a data set of {result['of']} (--problems)")
