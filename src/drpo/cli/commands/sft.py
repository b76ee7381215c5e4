"""`drpo sft`: its options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from drpo.cli.commands.train import require_data
from drpo.cli.options import asks_for_help, leading, parse
from drpo.cli.template_options import split_template
from drpo.errors import InputError, as_typed
from drpo.spec import import_named
from drpo.train.records import CONFIG, is_sft, read_config, refuse_part
from drpo.train.warmed import WARM_UP

USAGE = "sft: name the data first: drpo sft my.jsonl --model MODEL; or go on with a run: drpo sft --resume RUN"


@dataclass(frozen=True)
class SFTOptions:
    r"""Train a model to say what the assistant says in conversations: supervised fine-tuning, before RL.

      drpo sft my.jsonl --model smollm2-135m --out runs/warm
      drpo train demo --model runs/warm

    Each line of my.jsonl is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content":
    "..."}]}, or {"prompt": "...", "completion": "..."}. The model's chat template renders them; the loss is on the
    assistant's turns alone, all of them, each with the token that ends it. `drpo sft --resume RUN` goes on with an
    interrupted run.

    Args:
        model: smollm2-135m, tiny, a folder, a run's folder, or a hub id.
        out: folder of the run; default runs/sft, with a number appended if that is taken.
        epochs: how often every conversation is trained on.
        steps: optimiser updates, in place of epochs.
        batch: most conversations of an update; none of them twice.
        learning_rate: the peak; default 2e-5, with adapters 2e-4.
        max_tokens: a longer conversation is left out, and counted; nothing is cut.
        train_on: assistant, its turns alone; all, every token of the conversation but the first.
        test: a file of conversations for the held-out loss; default: some of the data.
        holdout: held-out conversations, at most a tenth of the data; 0 holds none out.
        eval_every: steps between evaluations of the held-out loss; 0 evaluates before and after only.
        lora_rank: 0 trains all weights; r trains rank-r adapters, which are merged into the saved model.
        base_precision: of the frozen weights beside adapters: fp32, or nf4 (QLoRA).
        precision: of the trainer's compute: auto, bf16, fp32, ...; as `drpo train` has it.
        master_weights: what the trainer holds and updates: fp32, or bf16; as `drpo train` has it.
        optimizer: adamw, adamw8bit or muon, with arguments as adamw(weight_decay=0).
        schedule: of the learning rate: linear, constant, cosine, each with warmup=STEPS.
        max_grad_norm: gradients are scaled down to this L2 norm; inf is off.
        micro_batch_tokens: most tokens that go through the model at once.
        shard: of several processes (torchrun): none, or fsdp.
        checkpoint_activations: auto, on or off: less memory, slower updates.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: how many of the last to keep; the best by held-out loss is kept besides.
        device: auto, cuda, mps or cpu.
        chat_template: a file with a Jinja template in place of the tokenizer's; it is saved with the model.
        seed: of everything random.
        plain: plain lines in place of the live table.
        track: send the figures to trackers besides: trackio, tensorboard, wandb.
        stall: seconds that a phase of a step may take. After that the stacks are written to stalled.txt, and the
            process ends with status 75. 0 waits for ever.
    """

    model: str = "smollm2-135m"
    out: Path | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 16
    learning_rate: float | None = None
    max_tokens: int = 2048
    train_on: str = "assistant"
    test: str = ""
    holdout: int = 100
    eval_every: int = 0
    lora_rank: int = 0
    base_precision: str = "fp32"
    precision: str = "auto"
    master_weights: str = "fp32"
    optimizer: str = "adamw"
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 4096
    shard: str = "none"
    checkpoint_activations: str = "auto"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    device: str = "auto"
    chat_template: Path | None = None
    seed: int = 0
    plain: bool = False
    track: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    stall: float = 7200.0


@dataclass(frozen=True)
class SFTResumeOptions:
    """Go on with a run of `drpo sft` from its last checkpoint: an interrupted one, or one that is to have more steps.

      drpo sft --resume runs/warm --steps 400

    Settings of the run that are given here change from the next step on, and are recorded as a new chapter of the run;
    those that are not given stay. Without any, the rest of it is as if nothing had happened.

    Args:
        steps: optimiser updates of the whole run; not fewer than are done.
        learning_rate: the peak.
        schedule: of the learning rate: linear, constant, cosine, each with warmup=STEPS.
        max_grad_norm: gradients are scaled down to this L2 norm; inf is off.
        micro_batch_tokens: most tokens that go through the model at once.
        checkpoint_activations: auto, on or off: less memory, slower updates.
        eval_every: steps between evaluations of the held-out loss; 0 evaluates before and after only.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: how many of the last to keep.
        device: cuda, mps or cpu, in place of the recorded one; numbers then round otherwise.
        plain: plain lines in place of the live table.
        track: send the figures to trackers besides: trackio, tensorboard, wandb.
        accept_records: resume although records were deleted, cut or changed since the checkpoint.
        stall: seconds that a phase may take, as `drpo sft --help` says.
    """

    steps: int | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    max_grad_norm: float | None = None
    micro_batch_tokens: int | None = None
    checkpoint_activations: str | None = None
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int | None = None
    device: str | None = None
    plain: bool = False
    track: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    accept_records: bool = False
    stall: float = 7200.0


def sft(arguments: list[str]) -> int:
    """`drpo sft DATA [--FIELD VALUE ...]` or `drpo sft --resume RUN`."""
    if arguments and arguments[0] == "--resume":
        return _resume(arguments[1:])
    name, rest = leading(arguments, "DATA", USAGE)
    if any(argument.partition("=")[0] == "--resume" for argument in rest):
        raise InputError("sft: a run goes on with its own data, so give it alone: drpo sft --resume RUN")
    of_template, rest = split_template(rest)
    options = parse(SFTOptions, rest, f"drpo sft {as_typed(name)}")
    if not asks_for_help(arguments):
        require_data(name)
        if options.test:
            require_data(options.test, "--test ")
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps {options.steps}: must be at least 1; leave it out to train by --epochs")
    return int(import_named("drpo.cli.sft", "begin", "command")(name, options, of_template))


def _resume(arguments: list[str]) -> int:
    name, rest = leading(arguments, "RUN", "sft --resume: name the run's folder")
    options = parse(SFTResumeOptions, rest, f"drpo sft --resume {as_typed(name)}")
    folder = Path(name)
    refuse_part(folder)
    if not (folder / CONFIG).exists():
        begin = f"drpo sft DATA --out {as_typed(folder)}"
        raise InputError(f"{folder}: no run there ({CONFIG} is missing); `{begin}` begins one")
    read_config(folder)
    if folder.resolve().name == WARM_UP and (folder.resolve().parent / CONFIG).exists():
        resume = f"drpo train --resume {as_typed(folder.parent)}"
        raise InputError(f"{folder}: the warm-up of a run; `{resume}` goes on with it")
    if not is_sft(folder):
        raise InputError(f"{folder}: no run of `drpo sft`; `drpo train --resume {as_typed(folder)}` goes on with it")
    return int(import_named("drpo.cli.sft", "resume", "command")(folder, options))
