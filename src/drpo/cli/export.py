"""The implementation of `drpo export`."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.export import ExportOptions
from drpo.cli.folder import open_run
from drpo.cli.output import writing_folder
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.nf4 import hold_base_
from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.model.saving import cast, save_model
from drpo.terminal import Terminal
from drpo.train import checkpoint, stored
from drpo.train.records import CHECKPOINTS, METRICS, MODEL, is_sft
from drpo.train.setup import load_model
from drpo.train.verify import holds_final_model
from drpo.train.warm_up import started

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(name: str, target: str, options: ExportOptions) -> int:
    """Write the weights of a run, or of a model, as a folder that any transformers program reads."""
    folder = Path(target)
    transformers_logging.disable_progress_bar()
    with writing_folder("export:", folder):
        if any(folder.iterdir()):
            raise InputError(f"export: {target} exists and is not an empty folder; name another")
        of_run = (Path(name) / METRICS).exists() and not is_sft(Path(name))
        model, tokenizer = _trained(Path(name), options) if of_run else _given(name, options)
        save_model(cast(model, DTYPES[options.dtype]), tokenizer, folder)
    Terminal().print(f"{target}: {model.num_parameters():,} weights in {options.dtype}")
    return 0


def _given(name: str, options: ExportOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if options.step:
        raise InputError(f"export: --step {options.step}: {name} is not a run of drpo; name the step's own folder")
    return loading.load(name)


def _trained(run: Path, options: ExportOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return trained(run, options.step, options.trust_remote_code, f"export: --step {options.step}")


def trained(
    run: Path, step: int, trust_remote_code: bool, option: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a run, at its end or at a checkpoint.

    Args:
        run: its folder.
        step: the checkpoint after so many steps; 0 for the newest weights.
        trust_remote_code: import the model that the run's configuration names as module:name.
        option: what asked for it, for messages.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    chosen, _ = weights_of(run, step, option)
    if chosen.name == MODEL:
        return loading.load(str(chosen))
    config = open_run(run, trust_remote_code, needed=("model",))
    model, tokenizer = load_model(started(config, run).model, config.rollout.stop)
    hold_base_(model, config.model.base_precision)
    temperature, rank = config.rollout.sampling.temperature, config.model.lora_rank
    policy = Policy(model, precision=FP32, temperature=temperature, lora_rank=rank, seed=config.seed)
    stored.require_sound(chosen)
    checkpoint.restore(chosen, policy.checkpointed(), None)
    return policy.plain(), tokenizer


def weights_of(run: Path, step: int, option: str) -> tuple[Path, int]:
    """Return the folder of a run's weights, its model's or a checkpoint, and the steps that they had been trained.

    Args:
        run, step, option: as for `trained`.

    Raises:
        InputError: there is no such checkpoint.
    """
    there, steps = stored.steps(run / CHECKPOINTS), open_run(run, False, needed=()).trainer.steps
    final = holds_final_model(run, steps)
    if final and step in (0, steps):
        return run / MODEL, steps
    if not there or (step and step not in there):
        held = ", ".join(map(str, there)) or "none"
        raise InputError(
            f"{option}: {run} holds checkpoints after steps {held}{f', and {steps}, its end' if final else ''}"
        )
    return there[step or max(there)], step or max(there)
