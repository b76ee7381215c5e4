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
from drpo.train.config import Run
from drpo.train.records import CHECKPOINTS, METRICS, MODEL
from drpo.train.setup import load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(name: str, target: str, options: ExportOptions) -> int:
    """Write the weights of a run, or of a model, as a folder that any transformers program reads."""
    folder = Path(target)
    transformers_logging.disable_progress_bar()
    with writing_folder("export:", folder):
        if any(folder.iterdir()):
            raise InputError(f"export: {target} exists and is not an empty folder; name another")
        model, tokenizer = _trained(Path(name), options) if (Path(name) / METRICS).exists() else _given(name, options)
        save_model(cast(model, DTYPES[options.dtype]), tokenizer, folder)
    Terminal().print(f"{target}: {model.num_parameters():,} weights in {options.dtype}")
    return 0


def _given(name: str, options: ExportOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if options.step:
        raise InputError(f"export: --step {options.step}: {name} is not a run of drpo; name the step's own folder")
    return loading.load(name)


def _trained(run: Path, options: ExportOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a run, at its end or at a checkpoint."""
    config, step = open_run(run, options.trust_remote_code, needed=()), options.step
    if (run / MODEL).is_dir() and step in (0, config.trainer.steps):
        return loading.load(str(run / MODEL))
    model, tokenizer = load_model(open_run(run, options.trust_remote_code, needed=("model",)))
    hold_base_(model, config.model.base_precision)
    temperature, rank = config.rollout.sampling.temperature, config.model.lora_rank
    policy = Policy(model, precision=FP32, temperature=temperature, lora_rank=rank, seed=config.seed)
    chosen = _checkpoint(run, config, step)
    stored.require_sound(chosen)
    checkpoint.restore(chosen, policy.checkpointed(), None)
    return policy.plain(), tokenizer


def _checkpoint(run: Path, config: Run, step: int) -> Path:
    there = stored.steps(run / CHECKPOINTS)
    if not there or (step and step not in there):
        held = ", ".join(map(str, there)) or "none"
        finished = f", and {config.trainer.steps}, its end" if (run / MODEL).is_dir() else ""
        raise InputError(f"export: --step {step}: {run} holds checkpoints after steps {held}{finished}")
    return there[step or max(there)]
