"""DRPO and the other objectives in TRL: `GRPOTrainer` and `GRPOConfig` with an objective.

TRL's loss runs unchanged, with its clip switched off, old := mu and A := A w; its aggregation (`loss_type`), KL,
entropy bonus, logging and generation are its own. Tested with TRL 1.10.0, 1.14.2 and 1.16.0.
"""

import math
from dataclasses import dataclass
from typing import Any

import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from drpo.adapters.grpo import REQUIRED, log_figures
from drpo.adapters.record import LossRecord
from drpo.adapters.settings import check_fields
from drpo.adapters.weighing import behavior_or_policy, objective_of, reweight, warn_untested
from drpo.errors import InputError

warn_untested("trl", "1.10.0", "1.16.0")


def refuse_unsloth(trainer: type) -> None:
    """Raise InputError if a trainer is Unsloth's, whose loss would bypass the objective."""
    if any(base.__name__.startswith("Unsloth") for base in trainer.__mro__):
        raise InputError(
            "Unsloth has replaced TRL's GRPOTrainer by one whose loss would bypass the objective: use DRPOTrainer of "
            "drpo.adapters.unsloth, or do not import unsloth"
        )


refuse_unsloth(GRPOTrainer)


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
        check_fields(self, REQUIRED)
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
        refuse_unsloth(trl.GRPOTrainer)  # which may have been replaced after the import of this module
        self._objective = objective_of(self.args.objective, "objective")
        self._record = LossRecord(self._objective)
        self._batch: dict[str, Any] | None = None

    def compute_loss(self, *positional: Any, **named: Any) -> Tensor:
        """Call GRPOTrainer's, and raise InputError if the objective's loss did not run in it."""
        loss: Tensor = super().compute_loss(*positional, **named)
        log_figures(
            self, self._record.take("compute_loss is not TRL's own (Unsloth replaces it: use drpo.adapters.unsloth)")
        )
        return loss

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
        self._record.note(logp, mu, advantage, keep)

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
