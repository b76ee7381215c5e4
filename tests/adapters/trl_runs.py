"""A small run of TRL's trainer."""

from pathlib import Path
from typing import Any

from drpo.adapters.trl import DRPOConfig

GROUP, ACCUMULATED, LONGEST = 4, 2, 9
"""Samples of a prompt; micro-batches of an update; the longest completion."""


def config(folder: Path, **changes: Any) -> DRPOConfig:
    """Two updates on every rollout, so that the second is off-policy even without noise; six in all."""
    chosen = {
        "objective": "drpo(0.2)",
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": ACCUMULATED,
        "num_iterations": 2,
        "num_generations": GROUP,
        "max_completion_length": LONGEST,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return DRPOConfig(output_dir=str(folder), **(chosen | changes))
