"""SkyRL: an objective as its policy loss, by `trainer.override_entrypoint=drpo.adapters.skyrl`.

SkyRL's own entry point then imports this module and calls `main`, which reads one more field of its configuration,
`trainer.algorithm.drpo_objective`, registers the loss "drpo" and runs SkyRL's experiment as it is. SkyRL scales
advantages by its loss reduction before the loss receives them, and passes the sampler's log-probabilities.

The loss reaches the workers through SkyRL's registry, by reference: drpo must be installed on every node.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, reduce_loss
from skyrl.train import trainer
from skyrl.train.config import AlgorithmConfig, SkyRLTrainConfig, TrainerConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray
from torch import Tensor

from drpo.adapters.record import require_ran
from drpo.adapters.weighing import figures, objective_of, token_loss, warn_untested
from drpo.errors import InputError
from drpo.objectives import Objective, vanishes_at_zero_advantage

NAME = "drpo"
"""Name of the loss in SkyRL's registry."""

FIELD = "trainer.algorithm.drpo_objective"
OVERRIDE = "trainer.override_entrypoint="
NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling parameters that the trainer ignores when it scores tokens, with their neutral values."""
TRUNCATING = {"top_p", "top_k", "min_p"}
"""Those of them that the trainer does not ignore where it scores over the tokens that the sampler kept."""
BENDING = {
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "bad_words",
    "allowed_token_ids",
}
"""The same for parameters that SkyRL passes on to vLLM."""
NO_LOGPROBS = (
    "generator.sampling_params.logprobs=null: the trust region is around the sampler, whose log-probabilities are then "
    "not reported; set it to 1"
)
SECOND_CORRECTION = (
    "trainer.algorithm.off_policy_correction (or use_tis) is on: the objective corrects for the sampler already; set "
    "tis_ratio_type, sequence_mask_metric and the thresholds to null, and use_tis to false"
)


@dataclass
class DrpoAlgorithmConfig(AlgorithmConfig):  # type: ignore[misc]
    """SkyRL's `trainer.algorithm` with one more field.

    Args:
        policy_loss_type: the loss that `register` registers.
        drpo_objective: the objective's spec, such as "drpo(0.2)"; there is no default.
    """

    policy_loss_type: str = NAME
    drpo_objective: str | None = None


@dataclass
class DrpoTrainerConfig(TrainerConfig):  # type: ignore[misc]
    """SkyRL's `trainer` with that `algorithm`."""

    algorithm: DrpoAlgorithmConfig = field(default_factory=DrpoAlgorithmConfig)


@dataclass
class DrpoTrainConfig(SkyRLTrainConfig):  # type: ignore[misc]
    """SkyRL's whole configuration with that `trainer`."""

    trainer: DrpoTrainerConfig = field(default_factory=DrpoTrainerConfig)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return an objective's loss summed over the kept tokens of a micro-batch, as SkyRL calls its policy losses.

    Args:
        log_probs: [B, T] nats, the current policy.
        old_log_probs: not used; the region is around the sampler.
        advantages: [B, T], scaled by SkyRL's loss reduction.
        config: SkyRL's `trainer.algorithm`, a `DrpoAlgorithmConfig`.
        loss_mask: [B, T] of 0 and 1; None keeps all.
        rollout_logprobs: [B, T] nats, the sampler's own.

    Returns:
        The sum, and `figures` under "drpo/".

    Raises:
        InputError: no objective, no log-probabilities of the sampler, or a second off-policy correction.
    """
    if rollout_logprobs is None:
        raise InputError(NO_LOGPROBS)
    if off_policy_correction_enabled(config.off_policy_correction):
        raise InputError(SECOND_CORRECTION)
    objective = objective_of(getattr(config, "drpo_objective", None), FIELD)
    keep = log_probs.new_ones(log_probs.shape) if loss_mask is None else loss_mask
    columns = (log_probs, rollout_logprobs, advantages, keep)
    region = figures(objective, *columns)
    values = torch.stack(list(region.values())).tolist()  # a single device sync
    loss: Tensor = reduce_loss(token_loss(objective, *columns), loss_mask)
    return loss, {f"drpo/{name}": value for name, value in zip(region, values, strict=True)}


def register() -> None:
    """Register the loss with SkyRL as "drpo"; a second call replaces the first.

    Call it on the driver before `validate_cfg`, as `main` does.
    """
    warn_untested("skyrl", "0.3.0", "0.4.0")
    if NAME in PolicyLossRegistry.list_available():
        PolicyLossRegistry.unregister(NAME)
    PolicyLossRegistry.register(NAME, policy_loss)


def check(cfg: Any) -> None:
    """Raise for a configuration in which the loss would not receive the sampler's log-probabilities.

    Args:
        cfg: a `DrpoTrainConfig`.

    Raises:
        InputError: names the first wrong field and its fix.
    """
    for message in _unfit(cfg):
        raise InputError(message)


def skip_old_logprobs() -> None:
    """Make SkyRL's trainer, in this process, skip the forward pass for old log-probabilities."""
    trainer.LOSSES_WITHOUT_OLD_LOGPROBS = trainer.LOSSES_WITHOUT_OLD_LOGPROBS | {NAME}


def check_steps(objective: Objective) -> None:
    """Make SkyRL's trainer, in this process, raise InputError after a policy step in which this loss did not run."""
    step = trainer.RayPPOTrainer._execute_training_step

    def checked(self: Any, model: str, *inputs: Any, **named_inputs: Any) -> Any:
        metrics = step(self, model, *inputs, **named_inputs)
        if model == "policy":
            require_ran(metrics, objective)
        return metrics

    trainer.RayPPOTrainer._execute_training_step = checked


def run(cfg: Any) -> None:
    """Run SkyRL's experiment; a task on the cluster, off its head node.

    Args:
        cfg: a `DrpoTrainConfig` that passed `check`.
    """
    skip_old_logprobs()
    check_steps(objective_of(cfg.trainer.algorithm.drpo_objective, FIELD))
    BasePPOExp(cfg).run()


def main() -> None:
    """Train as SkyRL's `main_base` does, with the loss registered and the configuration checked.

    Raises:
        SystemExit: 2, with one line on stderr, where the configuration is refused.
    """
    cfg = DrpoTrainConfig.from_cli_overrides([word for word in sys.argv[1:] if not word.startswith(OVERRIDE)])
    try:
        check(cfg)
    except InputError as error:
        print(f"drpo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    register()
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(ray.remote(num_cpus=1)(run).remote(cfg))


def _unfit(cfg: Any) -> Iterator[str]:
    """Yield the faults of a configuration, one line each."""
    algorithm, sampling = cfg.trainer.algorithm, cfg.generator.sampling_params
    objective = objective_of(algorithm.drpo_objective, FIELD)
    if not vanishes_at_zero_advantage(objective):
        yield (
            f"{FIELD}={algorithm.drpo_objective!r} is not weighted by the advantage, which SkyRL divides by numbers of "
            "tokens before the loss sees it: use one that is (and says vanishes_at_zero_advantage), such as 'drpo(0.2)'"
        )
    if algorithm.policy_loss_type != NAME:
        yield f"trainer.algorithm.policy_loss_type={algorithm.policy_loss_type}: would ignore {FIELD}; set it to {NAME}"
    if sampling.logprobs is None:
        yield NO_LOGPROBS
    if algorithm.use_tis or off_policy_correction_enabled(algorithm.off_policy_correction):
        yield SECOND_CORRECTION
    if not (cfg.generator.use_conversation_multi_turn or cfg.generator.batched):
        yield (
            "generator.use_conversation_multi_turn=false: SkyRL then trains an end token that it appends itself, with "
            "a log-probability of 0 in place of the sampler's; set it to true"
        )
    if cfg.trainer.fully_async.enabled:
        yield (
            "trainer.fully_async.enabled=true: this entry point runs SkyRL's synchronous trainer; call "
            "drpo.adapters.skyrl.register() in a fully asynchronous one of your own"
        )
    if cfg.generator.chat_template.name_or_path and not cfg.generator.batched:
        yield (
            f"generator.chat_template.name_or_path={cfg.generator.chat_template.name_or_path}: SkyRL then encodes the "
            "conversation again, without the sampler's log-probabilities; set it to null"
        )
    yield from _bent(sampling, replayed=_replays_support(algorithm))
    yield from _tempered(cfg)


def _replays_support(algorithm: Any) -> bool:
    """Return whether the trainer scores over the tokens that the sampler's truncation kept; since SkyRL 0.4."""
    return bool(getattr(algorithm, "enable_sample_support_replay", False))


def _bent(sampling: Any, replayed: bool) -> Iterator[str]:
    """Yield sampling parameters that make the sampling distribution differ from the trainer's."""
    for name, neutral in NEUTRAL.items():
        value = getattr(sampling, name)
        if value != neutral and not (name == "top_k" and value == 0) and not (replayed and name in TRUNCATING):
            yield (
                f"generator.sampling_params.{name}={value}: tokens come from a distribution that the trainer "
                f"does not score with; set it to {neutral}"
            )
    for name in sorted(BENDING & set(sampling.additional_kwargs or {})):
        yield (
            f"generator.sampling_params.additional_kwargs.{name}: tokens come from a distribution that the trainer "
            "does not score with; remove it"
        )


def _tempered(cfg: Any) -> Iterator[str]:
    """Yield faults by which sampler and trainer use different temperatures."""
    temperature = cfg.generator.sampling_params.temperature
    if cfg.trainer.algorithm.temperature != temperature:
        yield (
            f"trainer.algorithm.temperature={cfg.trainer.algorithm.temperature}: tokens are sampled at {temperature} "
            "(generator.sampling_params.temperature); leave it out"
        )
    engine = cfg.generator.inference_engine
    by_role = engine.enable_pd and hasattr(engine, "decode_init_kwargs")  # since SkyRL 0.4
    default = "processed" if getattr(engine, "enable_return_sample_support_set", False) else "raw"
    plain = temperature == 1 and not _replays_support(cfg.trainer.algorithm)
    for name in ("prefill_init_kwargs", "decode_init_kwargs") if by_role else ("engine_init_kwargs",):
        mode = getattr(engine, name).get("logprobs_mode", f"{default}_logprobs")
        if mode != "processed_logprobs" and not (plain and mode == "raw_logprobs"):
            yield (
                f"generator.sampling_params.temperature={temperature} with vLLM's logprobs_mode={mode}: the sampler "
                f"does not report what it samples with; set generator.inference_engine.{name}.logprobs_mode="
                "processed_logprobs"
            )
