"""DRPO and the other objectives in TRL: `GRPOTrainer` and `GRPOConfig` with an objective.

TRL's loss runs unchanged, with its clip switched off, old := mu and A := A w; its aggregation (`loss_type`), KL,
entropy bonus, logging and generation are its own. Tested with TRL 1.10.0, 1.14.2 and 1.16.0.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from drpo.adapters import behavior_or_policy, figures, objective_of, reweight, warn_untested
from drpo.errors import InputError

warn_untested("trl", "1.10.0", "1.16.0")

AGGREGATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")
_REGION = "the trust region is the objective's, so TRL's own stays off"
_DISTRIBUTION = "mu would not be the distribution that the completions are drawn from over the whole vocabulary"
REQUIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "epsilon": ((1.0,), _REGION),
    "epsilon_high": ((math.inf,), _REGION),
    "delta": ((None,), _REGION),
    "off_policy_mask_threshold": ((None,), _REGION),
    "importance_sampling_level": (
        ("token",),
        "the ratio is the objective's; write objective='gspo(3e-4, 4e-4)' for sequences",
    ),
    "vllm_importance_sampling_correction": ((False,), "the objective's ratio is against the sampler already"),
    "top_p": ((1.0,), _DISTRIBUTION),
    "top_k": ((0, None), _DISTRIBUTION),
    "min_p": ((None, 0.0), _DISTRIBUTION),
    "repetition_penalty": ((1.0,), _DISTRIBUTION),
    "loss_type": (AGGREGATIONS, "it only says how tokens are averaged here"),
}
"""Field -> the values with which the gradient is the objective's, our default first; and the reason."""


@dataclass
class DRPOConfig(GRPOConfig):  # type: ignore[misc]
    """`GRPOConfig` with an objective.

    Args:
        objective: its spec, such as "drpo(0.2)", "dppo(0.15)", "ppo(0.2, 0.28)", "spo(12.5)", "none", or
            `module:name` of your own. There is no default.
        recompute_behavior_logp: use the trainer's log-probabilities as mu if the sampler reports none, as with
            transformers' generate. The mismatch between sampler and trainer is then not corrected.

    Raises:
        InputError: an objective that cannot be used, or a field of GRPOConfig with which the gradient would not be the
            objective's.
    """

    objective: str | None = None
    recompute_behavior_logp: bool = False
    epsilon: float = 1.0
    epsilon_high: float | None = math.inf
    vllm_importance_sampling_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        objective_of(self.objective, "objective")
        for name, (allowed, why) in REQUIRED.items():
            value = getattr(self, name, allowed[0])
            if value not in allowed:
                known = " or ".join(repr(a) for a in allowed)
                raise InputError(f"{name}={value!r}: {why}; set {name}={known}")
        if self.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
            raise InputError(
                "use_liger_kernel=True: this version of TRL has a loss of its own behind it; set it to False"
            )


class DRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` whose gradient is that of `args.objective`.

    Args:
        *positional: as of GRPOTrainer.
        **named: as of GRPOTrainer; `args` is a `DRPOConfig`.

    Raises:
        InputError: `args` is not a DRPOConfig; or completions come from a sampler that reports no log-probabilities.

    Source: the gradient weight of arXiv 2606.09821, Table 1, put into the advantage (`drpo.adapters.reweight`).
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        if not isinstance(self.args, DRPOConfig):
            raise InputError(
                "args: DRPOTrainer needs a DRPOConfig, which says what objective='drpo(0.2)' or other to train with"
            )
        if not (self.use_vllm or self.rollout_func or self.args.recompute_behavior_logp):
            raise InputError(
                "use_vllm=False: transformers' generate reports no log-probabilities, so mu is not known; set "
                "use_vllm=True, give a rollout_func, or set recompute_behavior_logp=True to take the trainer's"
            )
        self._objective = objective_of(self.args.objective, "objective")
        self._batch: dict[str, Any] | None = None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._batch = dict(inputs)  # a copy: TRL keeps the batch and trains on it again
        try:
            loss: Tensor = super()._compute_loss(model, self._batch)
        finally:
            self._batch = None
        return loss

    def _get_per_token_logps_and_entropies(self, *positional: Any, **named: Any) -> Any:
        """Call GRPOTrainer's; for the loss, also reweight the batch, which TRL reads next."""
        result = super()._get_per_token_logps_and_entropies(*positional, **named)
        if self._batch is not None and named.get("compute_entropy"):
            self._weigh(self._batch, result[0].detach())
        return result

    def _weigh(self, batch: dict[str, Any], logp: Tensor) -> None:
        """Set old := mu and A := A w."""
        keep = batch["completion_mask"] * batch.get("tool_mask", 1)
        mu, advantage = self._behavior_logp(batch, logp), batch["advantages"]
        batch["advantages"] = reweight(self._objective, logp, mu, advantage, keep)
        batch["old_per_token_logps"] = behavior_or_policy(logp, mu, keep)
        self._log_region(figures(self._objective, logp, mu, advantage, keep))

    def _behavior_logp(self, batch: dict[str, Any], logp: Tensor) -> Tensor:
        sampled: Tensor | None = batch.get("sampling_per_token_logps")
        if sampled is not None:
            return sampled
        if not self.args.recompute_behavior_logp:
            raise InputError(
                "the sampler reported no log-probabilities, so mu is not known: let rollout_func return them, or set "
                "recompute_behavior_logp=True to make do with the trainer's own"
            )
        old: Tensor | None = batch.get("old_per_token_logps")
        return logp if old is None else old  # None if the policy has not changed since

    def _log_region(self, region: dict[str, Tensor]) -> None:
        over_processes = {"prob_diff_max": torch.max, "weight_min": torch.min}
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in region.items():
            gathered = self.accelerator.gather(value)
            metrics[f"drpo/{name}"].append(over_processes.get(name, torch.mean)(gathered).item())
