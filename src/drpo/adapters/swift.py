"""Any objective in ms-swift's GRPO: a file for `--external_plugins` that calls `install("drpo(0.2)")`.

Experimental. ms-swift has no registry of losses: `GRPOTrainer._compute_loss_and_metrics` computes log-probabilities,
and then reads old log-probabilities and advantages of its batch. `install` wraps that method and the call within it, so
that old := mu and A := A w by then, with the clip switched off. Aggregation (`--loss_type`), KL, entropy, padding-free
rows, chunks and the engines are ms-swift's.
"""

import copy
import functools
import math
from types import ModuleType
from typing import Any

from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from torch import Tensor

from drpo.adapters.grpo import REQUIRED, log_figures
from drpo.adapters.imports import when_imported
from drpo.adapters.record import LossRecord
from drpo.adapters.settings import Required, check_fields
from drpo.adapters.weighing import behavior_or_policy, objective_of, reweight, warn_untested
from drpo.errors import InputError

ELSEWHERE = ("swift.megatron.trainers.grpo_trainer", "swift.ray.megatron.grpo_trainer")
"""Modules with trainers whose loss is another."""
WRAPPED = ("__init__", "_compute_loss_and_metrics", "_get_per_token_logps_and_entropies", "compute_loss")
WITHOUT_EFFECT = ("epsilon", "epsilon_high", "vllm_importance_sampling_correction")
OWN: Required = {
    "use_liger_kernel": ((False,), "its fused loss is another"),
    "rollout_importance_sampling_mode": ((None,), "the objective's ratio is against the sampler already"),
    "off_policy_sequence_mask_delta": ((None,), "it is a trust region of its own beside the objective"),
}
"""Fields that TRL's GRPOConfig has not, as of `drpo.adapters.grpo.REQUIRED`."""


def check(args: Any) -> None:
    """Raise InputError, naming the flag, for arguments with which mu would not be the sampler's.

    Args:
        args: the trainer's.
    """
    check_fields(args, {**OWN, **REQUIRED}, besides=WITHOUT_EFFECT, setting="--{}={}")
    if not getattr(args, "use_vllm", False):
        raise InputError(
            "--use_vllm false: transformers' generate reports no log-probabilities, so mu is not known; set "
            "--use_vllm true"
        )


def install(objective: str | None, trainer: type = GRPOTrainer) -> None:
    """Give ms-swift's GRPO trainer, in this process, an objective's gradient.

    Args:
        objective: its spec, such as "drpo(0.2)".
        trainer: ms-swift's class; four of its methods are wrapped.

    Raises:
        InputError: no objective or an unknown one; Megatron's trainer, whose loss is another. When the trainer is built
            or trains: arguments that `check` refuses, no log-probabilities of the sampler, a bypassed loss.
    """
    warn_untested("ms-swift", "4.6.0", "4.6.0")
    parsed = objective_of(objective, "objective")
    for name in ELSEWHERE:
        when_imported(name, _refuse)
    build, compute, score, whole = (getattr(trainer, name) for name in WRAPPED)

    @functools.wraps(build)
    def built(self: Any, *positional: Any, **named: Any) -> None:
        build(self, *positional, **named)
        check(self.args)
        self.epsilon_low, self.epsilon_high = 1.0, math.inf
        self._drpo_batch, self._drpo_record = None, LossRecord(parsed)

    @functools.wraps(compute)
    def _compute_loss_and_metrics(self: Any, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        if grpo_batch.rollout_per_token_logps is None:
            raise InputError(
                "rollout_per_token_logps is missing, so the sampler's log-probabilities are unknown: use vLLM 0.10.2 "
                "or newer, and let a multi_turn_scheduler return rollout_logprobs for every trained token"
            )
        self._drpo_batch = copy.copy(grpo_batch)  # ms-swift trains on the batch again
        try:
            return compute(self, model, model_inputs, self._drpo_batch)
        finally:
            self._drpo_batch = None

    @functools.wraps(score)
    def _get_logps(self: Any, *positional: Any, **named: Any) -> Any:
        result = score(self, *positional, **named)
        if self._drpo_batch is not None:
            _weigh(self, self._drpo_batch, result[0].detach())
        return result

    @functools.wraps(whole)
    def compute_loss(self: Any, *positional: Any, **named: Any) -> Tensor:
        loss: Tensor = whole(self, *positional, **named)
        log_figures(self, self._drpo_record.take("ms-swift's compute_loss did not call _compute_loss_and_metrics"))
        return loss

    for name, function in zip(WRAPPED, (built, _compute_loss_and_metrics, _get_logps, compute_loss), strict=True):
        setattr(trainer, name, function)


def _weigh(trainer: Any, batch: Any, logp: Tensor) -> None:
    """Set old := mu and A := A w in a batch, whose rows are padded by now."""
    keep = batch.completion_mask.bool()
    if getattr(trainer, "overlong_filter", False):
        keep = keep & ~batch.truncated_mask.bool().unsqueeze(-1)
    columns = (logp, batch.rollout_per_token_logps, batch.advantages, keep)
    trainer._drpo_record.note(*columns)
    batch.advantages = reweight(trainer._drpo_record.objective, *columns)
    batch.old_per_token_logps = behavior_or_policy(logp, batch.rollout_per_token_logps, keep)


def _refuse(module: ModuleType) -> None:
    raise InputError(
        f"{module.__name__}: Megatron's trainer has a loss of its own, which would bypass the objective; use "
        "`swift rlhf`"
    )
