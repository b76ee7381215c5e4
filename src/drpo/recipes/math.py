"""Recipes on written mathematics."""

from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.tasks import AIME, GSM8K, DapoMath
from drpo.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainerConfig,
)
from drpo.train.optim import AdamW, Constant
from drpo.types import Sampling


def gsm8k() -> Run:
    """A 0.5B model learns grade-school word problems; requires a GPU."""
    return Run(
        name="gsm8k",
        model=ModelConfig("Qwen/Qwen2.5-0.5B-Instruct"),
        data=DataConfig(GSM8K(), prompts=32),
        rollout=RolloutConfig(sampling=Sampling(samples=8, max_new_tokens=512)),
        objective=ObjectiveConfig(DRPO(0.2), reduction=Horizon(512)),
        optimizer=OptimizerConfig(AdamW(1e-6), Constant(warmup=5)),
        trainer=TrainerConfig(steps=200, updates=4, micro_batch_tokens=16384),
        evaluation=EvaluationConfig(every=20, problems=256),
        checkpoints=CheckpointConfig(every=20),
    )


def drpo_paper() -> Run:
    """The setting of the DRPO paper (arXiv 2606.09821): Qwen3-4B-Base on DAPO-Math; requires large GPUs."""
    return Run(
        name="drpo_paper",
        model=ModelConfig("Qwen/Qwen3-4B-Base"),
        data=DataConfig(DapoMath(), prompts=64),
        rollout=RolloutConfig(sampling=Sampling(samples=8, max_new_tokens=8192)),
        objective=ObjectiveConfig(DRPO(12.5), reduction=Horizon(8192)),
        optimizer=OptimizerConfig(AdamW(1e-6, betas=(0.9, 0.999), weight_decay=0.01), max_grad_norm=1.0),
        trainer=TrainerConfig(steps=500, updates=4, micro_batch_tokens=32768),
        evaluation=EvaluationConfig(AIME(), every=10, problems=60, samples=16),
        checkpoints=CheckpointConfig(every=10),
    )
