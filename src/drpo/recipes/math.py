"""Recipes on written mathematics."""

from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.tasks import AIME, GSM8K, DapoMath
from drpo.train.config import Run
from drpo.train.optim import AdamW, Constant
from drpo.types import Sampling


def gsm8k() -> Run:
    """A 0.5B model learns grade-school word problems; requires a GPU."""
    return Run(
        name="gsm8k",
        model="Qwen/Qwen2.5-0.5B-Instruct",
        task=GSM8K(),
        objective=DRPO(0.2),
        reduction=Horizon(512),
        sampling=Sampling(samples=8, max_new_tokens=512),
        steps=200,
        prompts=32,
        updates=4,
        optimizer=AdamW(1e-6),
        schedule=Constant(warmup=5),
        micro_batch_tokens=16384,
        eval_every=20,
        eval_problems=256,
        checkpoint_every=20,
    )


def drpo_paper() -> Run:
    """The setting of the DRPO paper (arXiv 2606.09821): Qwen3-4B-Base on DAPO-Math; requires large GPUs."""
    return Run(
        name="drpo_paper",
        model="Qwen/Qwen3-4B-Base",
        task=DapoMath(),
        eval_task=AIME(),
        objective=DRPO(12.5),
        reduction=Horizon(8192),
        sampling=Sampling(samples=8, max_new_tokens=8192),
        steps=500,
        prompts=64,
        updates=4,
        optimizer=AdamW(1e-6, betas=(0.9, 0.999), weight_decay=0.01),
        max_grad_norm=1.0,
        micro_batch_tokens=32768,
        eval_every=10,
        eval_problems=60,
        eval_samples=16,
        checkpoint_every=10,
    )
