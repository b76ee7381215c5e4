"""What TRL's `GRPOTrainer` and the trainers made from it have in common: the fields to refuse, and their log."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drpo.adapters.settings import Required
from drpo.adapters.weighing import LOSS_TOKENS

AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")
_REGION = "the trust region is the objective's, so the framework's own stays off"
_DISTRIBUTION = "mu would not be the distribution that the completions are drawn from over the whole vocabulary"
SAMPLING: Required = {
    "top_p": ((1.0,), _DISTRIBUTION),
    "top_k": ((0, None, -1), _DISTRIBUTION),
    "min_p": ((None, 0.0), _DISTRIBUTION),
    "repetition_penalty": ((1.0, None), _DISTRIBUTION),
}
REQUIRED: Required = {
    "epsilon": ((1.0,), _REGION),
    "epsilon_high": ((math.inf,), _REGION),
    "delta": ((None,), _REGION),
    "off_policy_mask_threshold": ((None,), _REGION),
    "importance_sampling_level": (
        ("token",),
        "the ratio is the objective's; write objective='gspo(3e-4, 4e-4)' for sequences",
    ),
    "vllm_importance_sampling_correction": ((False,), "the objective's ratio is against the sampler already"),
    **SAMPLING,
    "loss_type": (AGGREGATIONS, "it only says how tokens are averaged here"),
}
"""Field -> the values with which the gradient is the objective's, our default first; and the reason."""


def log_figures(trainer: Any, region: Mapping[str, Tensor]) -> None:
    """Append figures, gathered over processes, to the metrics that the trainer logs, under "drpo/"."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in region.items():
        gathered = trainer.accelerator.gather(value)
        if name.startswith(LOSS_TOKENS):
            over_processes: Any = torch.sum
        else:
            over_processes = {"prob_diff_max": torch.max, "weight_min": torch.min}.get(name, torch.mean)
        metrics[f"drpo/{name}"].append(over_processes(gathered).item())
