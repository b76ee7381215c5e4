"""Any objective in ROLL's RLVR pipeline: `actor_train.worker_cls: drpo.adapters.roll.ActorWorker`.

Experimental. ROLL builds the worker by its dotted path. Its `loss_func` reads the batch's advantages, computes
log-probabilities, asks `get_old_log_probs_with_cache` for old ones, and computes a clipped surrogate. Here old := mu,
and A := A w is written into the batch's advantages at that question, with the clip off. Reductions, sample weights, KL
and entropy are ROLL's. The objective is `actor_train.system_envs: {DRPO_OBJECTIVE: drpo(0.2)}`.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

from roll.pipeline.rlvr.actor_worker import ActorWorker as FrameworkWorker
from torch import Tensor

from drpo.adapters.grpo import SAMPLING
from drpo.adapters.record import LossRecord
from drpo.adapters.settings import Required, check_fields
from drpo.adapters.weighing import LOSS_TOKENS, behavior_or_policy, objective_of, reweight
from drpo.errors import InputError

VARIABLE = "DRPO_OBJECTIVE"
FIELD = f"actor_train.system_envs.{VARIABLE}"
REQUIRED: Required = {
    "enable_old_logprobs_recompute": ((False,), "the correction would be weighed with the trainer's log-probabilities"),
    "dual_clip_loss": ((False,), "it is a trust region of its own beside the objective"),
    "importance_sampling": (("token",), "the ratio is the objective's; GSPO is the objective 'gspo(...)'"),
}
"""Field of the pipeline's configuration -> the values with which the gradient is the objective's, and the reason."""
UNCLIPPED = {"use_pg_clip_range": True, "pg_clip_low": 1.0, "pg_clip_high": math.inf}


def check(config: Any) -> None:
    """Raise InputError, naming the field, for a configuration with which mu would not be the sampler's.

    Args:
        config: the pipeline's.
    """
    check_fields(config, REQUIRED)
    correction = config.train_infer_correction
    if correction.is_weight.enabled or correction.filters:
        raise InputError(
            "train_infer_correction multiplies or masks the loss by a ratio that the objective already contains; set "
            "train_infer_correction.is_weight.enabled=false and filters=[]"
        )
    check_fields(config.actor_infer.generating_args, SAMPLING, setting="actor_infer.generating_args.{}={}")


class ActorWorker(FrameworkWorker):  # type: ignore[misc]
    """ROLL's worker of the policy, with the gradient of the objective in DRPO_OBJECTIVE."""

    _drpo_record: LossRecord | None = None

    def loss_func(self, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Call ROLL's, and raise InputError if the objective's loss did not run in it.

        Args:
            data: ROLL's batch; `infer_logprobs`, the sampler's, and masks and advantages are read here.
            output_tensor: the model's.
        """
        check(self.pipeline_config)
        sampled = data.batch.get("infer_logprobs", None)
        if sampled is None or len(sampled) == 0:
            raise InputError(
                "infer_logprobs is missing, and ROLL would take the trainer's own log-probabilities for the sampler's: "
                "set actor_infer.generating_args.logprobs=1 and use an engine that reports them"
            )
        record = LossRecord(objective_of(os.environ.get(VARIABLE), FIELD))
        advantages = data.batch["advantages"]
        data.batch["advantages"] = advantages.clone()  # written to below; ROLL trains on the batch again
        self._drpo_record = record
        try:
            with _unclipped(self.pipeline_config):
                loss, metrics = super().loss_func(data, output_tensor)
        finally:
            self._drpo_record = None
            data.batch["advantages"] = advantages
        region = record.take("ROLL's loss_func did not ask get_old_log_probs_with_cache")
        reduced = {f"drpo/{name}@{'sum' if name.startswith(LOSS_TOKENS) else 'mean'}": v for name, v in region.items()}
        return loss, metrics | {name: value.item() for name, value in reduced.items()}

    def get_old_log_probs_with_cache(self, data: Any, log_probs: Tensor) -> Tensor:
        """Return mu in the loss, and reweight the batch's advantages; ROLL's elsewhere."""
        if self._drpo_record is None:
            old: Tensor = super().get_old_log_probs_with_cache(data, log_probs)
            return old
        keep = data.batch.get("final_response_mask", data.batch["response_mask"][:, 1:])
        columns = (log_probs.detach(), data.batch["infer_logprobs"], data.batch["advantages"], keep)
        self._drpo_record.note(*columns)
        mu = behavior_or_policy(*columns[:2], keep)
        data.batch["advantages"].copy_(reweight(self._drpo_record.objective, *columns))
        return mu


@contextlib.contextmanager
def _unclipped(config: Any) -> Iterator[None]:
    before = {name: getattr(config, name) for name in UNCLIPPED}
    for name, value in UNCLIPPED.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
