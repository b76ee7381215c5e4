"""Any objective in AReaL: `DRPOTrainer(config, ..., objective="drpo(0.2)")` in place of `PPOTrainer`.

Experimental. AReaL has no registry of losses: `grpo_loss_fn` calls `ppo_actor_loss_fn`, a name of
`areal.trainer.ppo.actor`. `DRPOTrainer` puts an engine of this module in place of AReaL's, and AReaL's controllers
build it in their workers by its import path. While such an engine updates the policy, that name holds a function that
calls AReaL's with old := mu, A := A w and its clip switched off. Reductions, packing and logs are AReaL's.

The objective travels in the actor's configuration, `DRPOActorConfig`.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import areal.engine
import areal.trainer.ppo.actor as framework
import torch
from areal.api.cli_args import PPOActorConfig
from areal.engine import FSDPPPOActor
from areal.trainer.rl_trainer import PPOTrainer
from areal.utils import stats_tracker
from torch import Tensor

from drpo.adapters.record import LossRecord
from drpo.adapters.settings import Required, check_fields, in_yaml
from drpo.adapters.weighing import behavior_or_policy, objective_of, reweight, warn_untested
from drpo.errors import InputError

LOSS = "ppo_actor_loss_fn"
FIELD = "actor.drpo_objective"
_REGION = "it is a trust region of its own beside the objective"
_DISTRIBUTION = "it makes the sampler's log-probabilities those of another distribution than the trainer's"
ACTOR: Required = {
    "use_decoupled_loss": ((False,), "it puts a second policy between the sampler and the ratio"),
    "recompute_logprob": ((False,), "it overwrites the sampler's log-probabilities with the trainer's"),
    "use_sapo_loss": ((False,), "it is another loss; write it as an objective, 'sapo(...)'"),
    "rejection_sampling": ((None,), "it multiplies or masks the loss by a ratio that the objective already contains"),
    "m2_threshold": ((None,), _REGION),
    "c_clip": ((None,), _REGION),
    "importance_sampling_level": (("token",), "it is GSPO's, which is written as an objective, 'gspo(...)'"),
}
"""Field of `actor` -> the values with which the gradient is the objective's, and the effect of others."""
SAMPLING: Required = {"top_p": ((1.0,), _DISTRIBUTION), "top_k": ((-1, 0), _DISTRIBUTION)}
"""The same of `gconfig`; a `top_k` above any vocabulary is sound too."""
LARGEST_VOCABULARY = 1_000_000


@dataclass
class DRPOActorConfig(PPOActorConfig):  # type: ignore[misc]
    """AReaL's `actor` with an objective.

    Args:
        drpo_objective: its spec, such as "drpo(0.2)"; `DRPOTrainer` writes it. There is no default.
    """

    drpo_objective: str | None = None


def check(actor: Any, gconfig: Any) -> None:
    """Raise InputError, naming the field, for settings with which mu would not be the sampler's.

    Args:
        actor: a `PPOActorConfig`.
        gconfig: the training rollouts' `GenerationHyperparameters`.
    """
    check_fields(actor, ACTOR, setting="actor.{}={}", written=in_yaml)
    whole = ("top_k",) if gconfig.top_k >= LARGEST_VOCABULARY else ()
    check_fields(gconfig, SAMPLING, besides=whole, setting="gconfig.{}={}", written=in_yaml)
    if gconfig.temperature != actor.temperature:
        raise InputError(
            f"actor.temperature={actor.temperature}: tokens are sampled at {gconfig.temperature}, gconfig.temperature; "
            f"set actor.temperature={gconfig.temperature}"
        )


@contextlib.contextmanager
def weighed(record: LossRecord, module: ModuleType = framework) -> Iterator[None]:
    """Let AReaL's loss have an objective's gradient, and note each call in the record, for a while.

    Args:
        record: has the objective.
        module: `areal.trainer.ppo.actor`; as before afterwards.
    """
    original = getattr(module, LOSS)

    def loss(
        logprobs: Tensor, proximal_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor,
        cu_seqlens: Tensor | None = None, **settings: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        columns = (logprobs, old_logprobs, advantages, loss_mask)
        region = record.note(*columns)
        values = torch.stack(list(region.values())).tolist()  # a single device sync
        stats_tracker.scalar(**{f"drpo/{name}": value for name, value in zip(region, values, strict=True)})
        mu = behavior_or_policy(logprobs, old_logprobs, loss_mask)
        sequence = None if record.objective.tokenwise else _sequence(logprobs, cu_seqlens)
        result: tuple[Tensor, dict[str, Tensor]] = original(
            logprobs=logprobs,
            proximal_logprobs=mu,
            old_logprobs=mu,
            advantages=reweight(record.objective, *columns, sequence),
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            **{**settings, "eps_clip": 1.0, "eps_clip_higher": math.inf},
        )
        return result

    setattr(module, LOSS, loss)
    try:
        yield
    finally:
        setattr(module, LOSS, original)


class DRPOFSDPPPOActor(FSDPPPOActor):  # type: ignore[misc]
    """AReaL's FSDP engine of the policy, whose updates have the gradient of `config.drpo_objective`.

    Args:
        config: a `DRPOActorConfig`.
    """

    def ppo_update(self, *batch: Any, **named: Any) -> None:
        """Call AReaL's, and raise InputError if the objective's loss did not run in it."""
        record = LossRecord(objective_of(getattr(self.config, "drpo_objective", None), FIELD))
        with weighed(record):
            super().ppo_update(*batch, **named)
        record.take(f"AReaL's ppo_update did not call {LOSS} of areal.trainer.ppo.actor")


class DRPOTrainer(PPOTrainer):  # type: ignore[misc]
    """AReaL's `PPOTrainer` whose gradient is that of an objective.

    Args:
        config: AReaL's, such as a `GRPOConfig`; `actor` becomes a `DRPOActorConfig`.
        *positional: as of PPOTrainer.
        objective: its spec, such as "drpo(0.2)"; there is no default.
        **named: as of PPOTrainer.

    Raises:
        InputError: an objective that cannot be used, or settings with which mu would not be the sampler's.
    """

    def __init__(self, config: Any, *positional: Any, objective: str | None = None, **named: Any) -> None:
        warn_untested("areal", "1.0.4", "1.0.4")
        objective_of(objective, "objective")
        check(config.actor, config.gconfig)
        own = {field.name: getattr(config.actor, field.name) for field in fields(PPOActorConfig)}
        config.actor = DRPOActorConfig(**own, drpo_objective=objective)
        super().__init__(config, *positional, **named)

    def _create_train_engine(self, actor_config: Any, alloc: Any) -> Any:
        """Create the policy's engine from this module, and the reference's as AReaL does."""
        if not isinstance(actor_config, DRPOActorConfig):
            return super()._create_train_engine(actor_config, alloc)
        if alloc.backend != "fsdp":
            raise InputError(
                f"actor.backend={alloc.backend}: drpo does not reach the loss of {alloc.backend} engines; set fsdp"
            )
        areal.engine.FSDPPPOActor = DRPOFSDPPPOActor
        try:
            return super()._create_train_engine(actor_config, alloc)
        finally:
            areal.engine.FSDPPPOActor = FSDPPPOActor


def _sequence(logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """The index of each packed token's completion, [T], from the sequences' ends; None for padded rows."""
    if cu_seqlens is None or logprobs.dim() != 1:
        return None
    places = torch.arange(len(logprobs), device=logprobs.device)
    return torch.bucketize(places, cu_seqlens[1:].to(logprobs.device), right=True)
