"""Recipes on "What is a + b?": the demo, and a smoke test of the whole loop."""

from drpo import models
from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.tasks import Addition
from drpo.train.config import Run
from drpo.types import Sampling


def demo() -> Run:
    """SmolLM2-135M learns to add with DRPO, on a laptop's CPU, in minutes."""
    return Run(
        name="demo",
        model=models.SMOLLM2,
        task=Addition(1, 20),
        objective=DRPO(0.2),
        reduction=Horizon(32),
        sampling=Sampling(samples=8, max_new_tokens=32),
        steps=16,
        prompts=16,
        updates=4,
        learning_rate=2e-5,
        schedule="linear",
        micro_batch_tokens=2048,
        eval_problems=200,
    )


def smoke() -> Run:
    """A random two-layer model goes through the whole loop in seconds; it learns nothing worth knowing."""
    return Run(
        name="smoke",
        model=models.TINY,
        task=Addition(0, 9),
        objective=DRPO(0.2),
        reduction=Horizon(8),
        sampling=Sampling(samples=4, max_new_tokens=8),
        steps=4,
        prompts=4,
        updates=2,
        learning_rate=1e-3,
        eval_problems=8,
    )
