"""The configuration of supervised fine-tuning: one frozen record, of groups that a run of `drpo train` has too."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drpo.errors import InputError, as_typed
from drpo.train.config.checks import at_least, one_of, require
from drpo.train.config.groups import CheckpointConfig, FaultConfig, ModelConfig, OptimizerConfig
from drpo.train.config.saved import read_record
from drpo.train.optim import AdamW, Linear
from drpo.train.records import CONFIG, SFT, read_config

FULL_RATE, ADAPTER_RATE = 2e-5, 2e-4
"""Peak learning rates where none is given: of all weights, and of adapters."""


@dataclass(frozen=True)
class ConversationConfig:
    """The conversations that are trained on, and those that are held out.

    Args:
        path: a .jsonl, .json or .parquet file of messages, or of prompts and completions; a folder or a hub id.
        test: a file of held-out conversations; "" holds some of the data back.
        holdout: held-out conversations, at most a tenth of the data; 0 holds none out.
        max_tokens: a longer conversation is left out, and counted.
        train_on: assistant, its turns alone; all, every token but the first.
    """

    path: str = ""
    test: str = ""
    holdout: int = 100
    max_tokens: int = 2048
    train_on: str = "assistant"

    def __post_init__(self) -> None:
        at_least(0, holdout=self.holdout)
        at_least(2, max_tokens=self.max_tokens)
        one_of(("assistant", "all"), train_on=self.train_on)


@dataclass(frozen=True)
class SFTTrainerConfig:
    """How long training lasts, and how its work is divided.

    Args:
        steps: optimiser updates; 0 leaves it to `epochs` until the data is read.
        epochs: how often every conversation is trained on.
        batch: most conversations of an update; those of an epoch are about equal, and none has one twice.
        micro_batch_tokens: most tokens that go through the model at once.
        shard: none or fsdp, see `TrainerConfig`.
        checkpoint_activations: auto, on or off, see `TrainerConfig`.
        eval_every: steps between evaluations of the held-out loss; 0 evaluates before and after only.
    """

    steps: int = 0
    epochs: float = 1.0
    batch: int = 16
    micro_batch_tokens: int = 4096
    shard: str = "none"
    checkpoint_activations: str = "auto"
    eval_every: int = 0

    def __post_init__(self) -> None:
        at_least(0, steps=self.steps, eval_every=self.eval_every)
        at_least(1, batch=self.batch, micro_batch_tokens=self.micro_batch_tokens)
        require(0 < self.epochs <= 10_000, "epochs", self.epochs, "must be above 0, and at most 10000")
        one_of(("none", "fsdp"), shard=self.shard)
        one_of(("auto", "on", "off"), checkpoint_activations=self.checkpoint_activations)


@dataclass(frozen=True)
class SFTConfig:
    """Everything that determines a run of supervised fine-tuning.

    Args:
        name: the run's folder is runs/NAME unless --out says otherwise.
        kind: says in config.json which kind of run it is.
        model: what is trained.
        data: the conversations.
        optimizer: how weights take their steps; the critic's is unused.
        trainer: how long, and how the work is divided.
        checkpoints: when, and which are kept.
        faults: what a run bears.
        seed: of everything random.
    """

    name: str = SFT
    kind: str = SFT
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ConversationConfig = field(default_factory=ConversationConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(AdamW(2e-5), Linear()))
    trainer: SFTTrainerConfig = field(default_factory=SFTTrainerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.kind == SFT, "kind", repr(self.kind), f"must be {SFT!r}")
        whole = self.trainer.shard == "none"
        divisible = not getattr(self.optimizer.policy, "whole_matrices", False)
        require(whole or divisible, "optimizer", "muon", "it requires whole matrices; set --shard none, or use adamw")
        rule = "weights in 4 bits or bf16 are not divided; set --shard none"
        plain = self.model.base_precision == "fp32" and self.model.master_weights == "fp32"
        require(whole or plain, "shard", self.trainer.shard, rule)

    def with_steps(self, steps: int) -> "SFTConfig":
        """Return the configuration with the number of its updates, which the epochs of its data say."""
        return replace(self, trainer=replace(self.trainer, steps=steps))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        peak = self.optimizer.policy.learning_rate
        return self.optimizer.schedule(peak, update=step, total=self.trainer.steps, per_step=1)


def load_sft(folder: Path, trust_remote_code: bool = True) -> SFTConfig:
    """Return the configuration of the run of supervised fine-tuning in `folder`.

    Args:
        folder: of the run.
        trust_remote_code: as for `drpo.train.config.from_json`.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    record: Mapping[str, Any] = read_config(folder)
    if record.get("kind") != SFT:
        raise InputError(f"{folder}: no run of `drpo sft`; `drpo train --resume {as_typed(folder)}` goes on with it")
    try:
        return read_record(record, SFTConfig, trust_remote_code)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
