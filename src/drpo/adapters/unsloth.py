"""DRPO and the other objectives in Unsloth: `DRPOTrainer` in place of `GRPOTrainer`, after `import unsloth`.

Experimental. Unsloth replaces TRL's trainer when it is imported, and its `compute_loss` never calls TRL's loss. It
hands the log-probabilities to `UnslothEfficientGRPO` (or `grpo_compute_loss_slow`), names of the module that it writes
for the trainer. While `DRPOTrainer.compute_loss` runs, these names hold functions that call Unsloth's with old := mu,
A := A w and its clips switched off. Unsloth's aggregation, KL, packing and generation are its own.

Unsloth keeps the sampler's log-probabilities with UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD=1 alone.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from drpo.adapters.grpo import REQUIRED, SAMPLING, log_figures
from drpo.adapters.record import LossRecord
from drpo.adapters.settings import check_fields
from drpo.adapters.weighing import behavior_or_policy, objective_of, reweight
from drpo.errors import InputError

AS_OLD = "UNSLOTH_GRPO_ROLLOUT_LOGPROBS_AS_OLD"
REJECTION = "UNSLOTH_GRPO_ROLLOUT_RS"
EFFICIENT, SLOW = "UnslothEfficientGRPO", "grpo_compute_loss_slow"
"""The names in the module of Unsloth's trainer that its loss is computed through."""

WITHOUT_EFFECT = ("epsilon", "epsilon_high", "vllm_importance_sampling_correction")
"""Fields of GRPOConfig that DRPOTrainer overrides at every call."""

SWITCHED_OFF = {"epsilon_low": 1.0, "epsilon_high": float("inf"), "delta": None, "rollout_logps_as_old": False}
"""Arguments of Unsloth's loss: its clips, and the dual clip and the bound on the log-ratio that it adds for mu."""


def module_of(trainer: type) -> ModuleType:
    """Return the module that Unsloth wrote for its trainer.

    Raises:
        InputError: the trainer is TRL's own, or that of a version with other names.
    """
    for base in trainer.__mro__:
        module = sys.modules.get(base.__module__)
        if module is not None and all(hasattr(module, name) for name in (EFFICIENT, SLOW)):
            return module
    raise InputError(
        f"trl.GRPOTrainer is {trainer.__name__}, not Unsloth's with {EFFICIENT} and {SLOW}: import unsloth before "
        "drpo.adapters.unsloth, or without Unsloth use drpo.adapters.trl"
    )


class DRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """Unsloth's `GRPOTrainer` whose gradient is that of an objective.

    Args:
        *positional: as of GRPOTrainer.
        objective: its spec, such as "drpo(0.2)"; there is no default.
        **named: as of GRPOTrainer; `args` is a plain `GRPOConfig`, whose `epsilon` and `epsilon_high` have no effect.

    Raises:
        InputError: an objective that cannot be used; settings with which mu would not be the sampler's or the gradient
            not the objective's; a step in which the loss did not run.
    """

    def __init__(self, *positional: Any, objective: str | None = None, **named: Any) -> None:
        self._drpo_record = LossRecord(objective_of(objective, "objective"))
        self._drpo_module = module_of(type(self))
        super().__init__(*positional, **named)
        check(self.args, os.environ)

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *rest: Any, **named: Any) -> Tensor:
        """Call Unsloth's with the objective's weights, and raise InputError if the loss did not run in it."""
        if inputs.get("unsloth_rollout_logps_as_old") is None:
            raise InputError(
                f"{AS_OLD}=1 was not applied to this batch (Unsloth's warning says why), so the sampler's "
                "log-probabilities are unknown: set use_vllm=True, or let rollout_func return them"
            )
        with weighed(self._drpo_module, self._drpo_record):
            loss: Tensor = super().compute_loss(model, inputs, *rest, **named)
        log_figures(self, self._drpo_record.take(f"Unsloth's compute_loss called neither {EFFICIENT} nor {SLOW}"))
        return loss


def check(config: Any, environment: Mapping[str, str]) -> None:
    """Raise InputError, naming the setting, for a set-up in which mu would not be the sampler's.

    Args:
        config: the trainer's `GRPOConfig`.
        environment: the process's variables.
    """
    check_fields(config, REQUIRED, besides=WITHOUT_EFFECT)
    check_fields(getattr(config, "vllm_sampling_params", None), SAMPLING, setting="vllm_sampling_params.{}={}")
    if environment.get(AS_OLD) != "1":
        raise InputError(
            f"{AS_OLD}={environment.get(AS_OLD, '')}: Unsloth then takes the trainer's own log-probabilities for the "
            f"sampler's; set {AS_OLD}=1 before the first rollout"
        )
    if environment.get(REJECTION):
        raise InputError(
            f"{REJECTION}={environment[REJECTION]} is a trust region of its own beside the objective; unset it, and "
            "write a mask of drpo into the objective"
        )


@contextlib.contextmanager
def weighed(module: ModuleType, record: LossRecord) -> Iterator[None]:
    """Let Unsloth's loss have an objective's gradient, and note each call in the record, for a while.

    Args:
        module: `module_of` the trainer; as before afterwards.
        record: has the objective.
    """
    efficient, slow = getattr(module, EFFICIENT), getattr(module, SLOW)

    def arguments(new: Tensor, old: Tensor, mask: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        columns = (new, old, advantages, mask)
        record.note(*columns)
        return behavior_or_policy(new, old, mask), reweight(record.objective, *columns)

    class Weighed:
        @staticmethod
        def apply(
            new: Tensor, old: Tensor, ref: Any, sampling: Any, head: Any, ids: Any, mask: Tensor, advantages: Tensor,
            beta: float, scaler: Any = None, n_chunks: int = 1, settings: Mapping[str, Any] | None = None, *rest: Any,
        ) -> Any:  # fmt: skip
            """Call Unsloth's, whose positions these are; it differentiates by `new` alone."""
            mu, advantages = arguments(new, old, mask, advantages)
            settings = {**(settings or {}), **SWITCHED_OFF}
            return efficient.apply(
                new, mu, ref, None, head, ids, mask, advantages, beta, scaler, n_chunks, settings, *rest
            )

    def loss(
        ref: Any, new: Tensor, old: Tensor, sampling: Any, ids: Any, mask: Tensor, beta: float, advantages: Tensor,
        **settings: Any,
    ) -> Any:  # fmt: skip
        mu, advantages = arguments(new, old, mask, advantages)
        return slow(ref, new, mu, None, ids, mask, beta, advantages, **{**settings, **SWITCHED_OFF})

    setattr(module, EFFICIENT, Weighed)
    setattr(module, SLOW, loss)
    try:
        yield
    finally:
        setattr(module, EFFICIENT, efficient)
        setattr(module, SLOW, slow)
