"""The implementation of `drpo sft`: supervised fine-tuning on a file of conversations, or from a checkpoint."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from drpo.cli.commands.sft import SFTOptions, SFTResumeOptions
from drpo.cli.output import attempt
from drpo.cli.runs import reading
from drpo.cli.template_options import read_template
from drpo.cli.train import made_folder, new_folder, require_stall
from drpo.errors import InputError, as_typed, counted, nearest
from drpo.live.console import SFTConsole
from drpo.live.track import TRACKERS, Tracked
from drpo.ranks import Ranks, is_elastic, process_group, select_device
from drpo.report.sft_page import write_sft_report
from drpo.spec import split_call
from drpo.terminal import Terminal
from drpo.train.callbacks import CallbackList
from drpo.train.config import CheckpointConfig, ModelConfig, OptimizerConfig, read_value
from drpo.train.config.sft import (
    ADAPTER_RATE,
    FULL_RATE,
    ConversationConfig,
    SFTConfig,
    SFTTrainerConfig,
    load_sft,
)
from drpo.train.records import CHECKPOINTS, CONFIG, FILES, MODEL, SFT
from drpo.train.sft.continued import with_changes
from drpo.train.sft.loop import fine_tune
from drpo.train.stored import latest, step_of
from drpo.train.watchdog import Watchdog


def begin(data: str, options: SFTOptions, of_template: Mapping[str, Any]) -> int:
    """Train in a new folder; called in every process.

    Args:
        data: the file, folder or hub id of the conversations.
        options: the options.
        of_template: arguments of the chat template, by name.
    """
    config = configured(data, options, of_template)
    select_device()
    with process_group() as ranks:
        if config.trainer.shard != "none" and ranks.size == 1 and not is_elastic():
            raise InputError(f"--shard {config.trainer.shard}: this is one process, which divides nothing")
        with ranks.reraise_on_all():
            wanted = options.out or (new_folder(Path("runs") / SFT) if ranks.is_main else Path())
        folder = ranks.gather([wanted])[0]
        with made_folder("--out", folder, ranks):
            there = [name for name in (CONFIG, *FILES) if (folder / name).exists()]
            if there and not is_elastic():
                resume = f"drpo sft --resume {as_typed(folder)}"
                raise InputError(f"--out {folder}: a run is there; `{resume}` goes on with it")
            ranks.barrier()  # before rank 0 writes to it
            return _run(config, folder, options, ranks)


def resume(folder: Path, options: SFTResumeOptions) -> int:
    """Go on with a run from its last checkpoint; called in every process.

    Args:
        folder: of the run.
        options: the options.
    """
    stored = load_sft(folder)
    config = _changed(stored, options)
    with reading(folder):
        _require_steps(folder, stored, config)
    if options.device is not None:
        config = replace(config, model=replace(config.model, device=options.device))
    select_device()
    with process_group() as ranks, made_folder("--resume", folder, ranks):
        return _run(config, folder, options, ranks, options.accept_records)


def _changed(config: SFTConfig, options: SFTResumeOptions) -> SFTConfig:
    """Return the configuration with the settings that the options change."""
    names = ("steps", "max_grad_norm", "micro_batch_tokens", "checkpoint_activations", "eval_every")
    values = {name: getattr(options, name) for name in (*names, "checkpoint_every", "keep_checkpoints")}
    schedule = None if options.schedule is None else read_value("schedule", options.schedule)
    return with_changes(config, {**values, "schedule": schedule}, options.learning_rate)


def _require_steps(folder: Path, stored: SFTConfig, config: SFTConfig) -> None:
    """Raise unless a run can go on, and the changes have a step to act on."""
    last, steps = latest(folder / CHECKPOINTS), config.trainer.steps
    done = 0 if last is None else step_of(last)
    if steps < max(1, done):
        raise InputError(f"--steps {steps}: {counted(done, 'step')} are done; give more")
    if config != stored and steps == done:
        raise InputError(f"{folder}: all {counted(steps, 'step')} are done, so nothing would change; add --steps")


def configured(data: str, options: SFTOptions, of_template: Mapping[str, Any]) -> SFTConfig:
    """Return the configuration that a command line asks for.

    Args:
        data: the file, folder or hub id of the conversations.
        options: the options.
        of_template: arguments of the chat template, by name.

    Raises:
        InputError: a value that a field refuses; the message names it.
    """
    return SFTConfig(
        model=ModelConfig(
            name=options.model,
            lora_rank=options.lora_rank,
            base_precision=options.base_precision,
            precision=options.precision,
            master_weights=options.master_weights,
            device=options.device,
            chat_template="" if options.chat_template is None else read_template(options.chat_template),
            chat_template_kwargs=dict(of_template) or None,
        ),
        data=ConversationConfig(
            path=data,
            test=options.test,
            holdout=options.holdout,
            max_tokens=options.max_tokens,
            train_on=options.train_on,
        ),
        optimizer=OptimizerConfig(
            policy=_optimizer(options),
            schedule=read_value("schedule", options.schedule),
            max_grad_norm=options.max_grad_norm,
        ),
        trainer=SFTTrainerConfig(
            steps=options.steps or 0,
            epochs=options.epochs,
            batch=options.batch,
            micro_batch_tokens=options.micro_batch_tokens,
            shard=options.shard,
            checkpoint_activations=options.checkpoint_activations,
            eval_every=options.eval_every,
        ),
        checkpoints=CheckpointConfig(options.checkpoint_every, options.keep_checkpoints),
        seed=options.seed,
    )


def _optimizer(options: SFTOptions) -> Any:
    """The optimiser with its peak learning rate: the option's, or that of its spec, or a usual one."""
    optimizer: Any = read_value("optimizer", options.optimizer)
    _, args, named = split_call(options.optimizer.rpartition(":")[2])
    if options.learning_rate is not None:
        return replace(optimizer, learning_rate=options.learning_rate)
    if args or "learning_rate" in named:
        return optimizer
    return replace(optimizer, learning_rate=ADAPTER_RATE if options.lora_rank else FULL_RATE)


def _run(
    config: SFTConfig,
    folder: Path,
    options: SFTOptions | SFTResumeOptions,
    ranks: Ranks,
    accept_records: bool = False,
) -> int:
    require_stall(options.stall)
    unknown = next((name for name in options.track if name not in TRACKERS), None)
    if unknown is not None:
        raise InputError(f"--track {unknown!r}{nearest(unknown, TRACKERS)}")
    transformers_logging.disable_progress_bar()
    if not ranks.is_main:
        with Watchdog(folder, options.stall, ranks.rank, command="drpo sft") as watchdog:
            fine_tune(config, folder, watchdog, ranks, accept_records=accept_records)
        return 0
    console = Terminal()
    with SFTConsole(console, console.is_terminal and not options.plain) as screen, ExitStack() as stack:
        trackers = [Tracked(name, TRACKERS[name], screen.note) for name in dict.fromkeys(options.track)]
        tracked = [stack.enter_context(tracker) for tracker in trackers]
        watchdog = stack.enter_context(Watchdog(folder, options.stall, command="drpo sft"))
        together = CallbackList(screen, *tracked, watchdog)
        summary = fine_tune(config, folder, together, ranks, accept_records=accept_records)
    report = attempt("report", folder, lambda: write_sft_report(folder))
    _conclude(console, folder, summary, report)
    return 128 + int(summary["stopped_by_signal"]) if summary["stopped_by_signal"] else 0


def _conclude(console: Console, folder: Path, summary: Mapping[str, Any], report: Path | None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for when in ("before", "after"):
        if summary[f"held_out_{when}"] is not None:
            table.add_row(f"held-out loss {when}", f"{summary[f'held_out_{when}']:.4f}", "nats a token")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in summary["seconds"].items())
    table.add_row("seconds", spent, "")
    table.add_row("tokens", f"{summary['trained_tokens']:,}", "trained on")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB", "")
    console.print(table)
    if report is not None:
        console.print(f"report       {report}", soft_wrap=True)
    if summary["finished"]:
        again = f"drpo train RECIPE --model {as_typed(folder)}"
        console.print(f"model        {folder / MODEL}\nRL from it   {again}", soft_wrap=True)
    else:
        console.print(f"stopped early; go on with: drpo sft --resume {as_typed(folder)}", soft_wrap=True)
