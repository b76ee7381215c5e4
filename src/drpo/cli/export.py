"""The implementation of `drpo export`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.export import ExportOptions
from drpo.cli.hub import card_of, push, require_pushable
from drpo.cli.output import require_file, writing_folder
from drpo.cli.trained import TrainedModel, model_of, restored, run_of, trained_model, untrained, weights_of
from drpo.errors import InputError
from drpo.model.adapter_folder import write_adapter
from drpo.model.gguf_file import write_gguf
from drpo.model.names import SMOLLM2
from drpo.model.saving import cast, save_model
from drpo.model.smollm2 import smollm2
from drpo.objectives import REGISTRY
from drpo.rollout.turn_ends import stop_ids
from drpo.spec import format_spec
from drpo.terminal import Terminal
from drpo.train.records import CHECKPOINTS, is_run
from drpo.train.stored import steps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(name: str, target: str, options: ExportOptions) -> int:
    """Write the weights of a run, or of a model, as a folder or a file, and upload it where that was asked for."""
    transformers_logging.disable_progress_bar()
    api = None if options.push is None else require_pushable(options.push, options.overwrite)
    write = _write_gguf if options.gguf else _write_adapter if options.adapter else _write_folder
    Terminal().print(f"{target}: {write(name, Path(target), options)}")
    if api is not None and options.push is not None:
        push(api, options.push, Path(target), options.public, _card(name))
    return 0


def _write_folder(name: str, folder: Path, options: ExportOptions) -> str:
    with _new_folder(folder):
        model, tokenizer = model_of(name, options.step, options.trust_remote_code, "export")
        save_model(cast(model, DTYPES[options.dtype]), tokenizer, folder)
    return f"{model.num_parameters():,} weights in {options.dtype}"


def _write_gguf(name: str, file: Path, options: ExportOptions) -> str:
    require_file("export:", file)
    if file.exists():
        raise InputError(f"export: {file} exists; name another")
    model, tokenizer = model_of(name, options.step, options.trust_remote_code, "export")
    run = run_of(name, False)
    stop = stop_ids(model, tokenizer, () if run is None else run.rollout.stop)
    write_gguf(model, tokenizer, stop, file, options.dtype)
    return f"{model.num_parameters():,} weights in {options.dtype}, as GGUF"


def _write_adapter(name: str, folder: Path, options: ExportOptions) -> str:
    run, trust = Path(name), options.trust_remote_code
    config = trained_model(run, trust)
    if not config.model.lora_rank:
        raise InputError(f"export: --adapter: {name} trained all weights (lora_rank=0); leave --adapter out")
    if config.model.base_precision != "fp32":
        raise InputError(
            f"export: --adapter: {name} trained beside weights in {config.model.base_precision}, and on others its "
            "adapter is another function; without --adapter the whole model is written, with the weights as held"
        )
    chosen = _checkpoint(run, options.step)
    with _new_folder(folder):
        policy, tokenizer = restored(run, chosen, trust)
        base, _ = untrained(run, trust, warm=True)
        write_adapter(policy, base, _base(run, config), tokenizer, folder, DTYPES[options.dtype])
    return f"adapter of rank {config.model.lora_rank} for {_base(run, config)}"


def _checkpoint(run: Path, step: int) -> Path:
    """Return the checkpoint after so many steps, or the last; the model of a run's end has no adapter any more."""
    there, (_, wanted) = steps(run / CHECKPOINTS), weights_of(run, step, f"export: --step {step}")
    if wanted not in there:
        raise InputError(f"export: --adapter: {run} has no checkpoint after {wanted} steps, and its model is merged")
    return there[wanted]


def _base(run: Path, config: TrainedModel) -> str:
    """Return how others find the model that a run's updates began with: a hub id, or a folder of this machine."""
    name = config.model.name
    folder = smollm2() if name == SMOLLM2 else Path(name)
    return str(folder.resolve()) if folder.is_dir() else name


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    with writing_folder("export:", folder):
        if any(folder.iterdir()):
            raise InputError(f"export: {folder} exists and is not an empty folder; name another")
        yield


def _card(name: str) -> str:
    """The README.md of an uploaded model."""
    run = run_of(name, False)
    if not is_run(name):
        return card_of(None, None)
    base = trained_model(Path(name), True).first.name
    is_id = base.count("/") == 1 and ":" not in base and not Path(base).exists()
    return card_of(base if is_id else None, None if run is None else format_spec(run.objective.loss, REGISTRY))
