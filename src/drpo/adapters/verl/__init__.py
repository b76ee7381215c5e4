"""verl: a policy loss "drpo" whose objective is a field of verl's configuration.

    actor_rollout_ref.actor.policy_loss._target_=drpo.adapters.verl.DRPOPolicyLossConfig
    actor_rollout_ref.actor.policy_loss.loss_mode=drpo
    '+actor_rollout_ref.actor.policy_loss.objective="drpo(0.2)"'
    '+actor_rollout_ref.actor.policy_loss.rollout_correction=${algorithm.rollout_correction}'
    algorithm.rollout_correction.bypass_mode=true

Every worker builds its configuration from these fields. This imports the module, which registers the loss. verl passes
only `old_log_prob` to its loss. These are the sampler's log-probabilities only in bypass mode, so the loss requires
`algorithm.rollout_correction`. `python -m drpo.adapters.verl` checks the rest of a configuration.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, register_policy_loss
from verl.workers.config import ActorConfig, PolicyLossConfig

from drpo.adapters import figures, objective_of, token_loss, warn_untested
from drpo.errors import InputError

__all__ = ["LOSS", "DRPOPolicyLossConfig", "check", "policy_loss"]

LOSS = "drpo"
FIELD = "actor_rollout_ref.actor.policy_loss"
TARGET = "drpo.adapters.verl.DRPOPolicyLossConfig"
ROLLOUT = "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"

RENORMALISED = "log-probabilities are renormalised over what is left of the vocabulary, the trainer's are not"
UNSOUND: tuple[tuple[str, tuple[object, ...], str], ...] = (
    (f"{FIELD}.loss_mode", (LOSS,), "is another loss: start it with verl.trainer.main_ppo"),
    (f"{FIELD}._target_", (TARGET,), "has no field for an objective"),
    ("trainer.use_v1", (True,), "is the legacy trainer, which renames the loss in bypass mode"),
    (f"{ROLLOUT}.calculate_log_probs", (True,), "leaves the sampler's log-probabilities out"),
    (f"{ROLLOUT}.logprobs_mode", ("processed_logprobs",), "reports them at another temperature than was sampled at"),
    (f"{ROLLOUT}.do_sample", (True,), "samples nothing"),
    (f"{ROLLOUT}.top_k", (-1, 0), RENORMALISED),
    (f"{ROLLOUT}.top_p", (1,), RENORMALISED),
)
"""A field, its values with which old_log_prob is the sampling distribution, and the effect of other values."""


@dataclass
class DRPOPolicyLossConfig(PolicyLossConfig):  # type: ignore[misc]
    """verl's `policy_loss` with an objective of drpo.

    Args:
        loss_mode: "drpo".
        objective: its spec, such as "drpo(0.2)"; there is no default.
        rollout_correction: verl's field; set it to `${algorithm.rollout_correction}`.

    Raises:
        InputError: no objective or an unknown one; another loss under `loss_mode`, or under its name in the registry;
            a rollout correction with which the loss would not receive the sampler's log-probabilities, or the loss
            would already be weighted.

    Example:
        >>> DRPOPolicyLossConfig(objective="drpo(0.2)", rollout_correction={"bypass_mode": True}).loss_mode
        'drpo'
    """

    loss_mode: str = LOSS
    objective: str | None = None

    def __post_init__(self) -> None:
        warn_untested("verl", "0.9.1", "0.9.1")
        objective_of(self.objective, f"{FIELD}.objective")
        _check_loss(self.loss_mode)
        _check_correction(self.rollout_correction)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Return an objective's loss in the form of verl's registry, aggregated by verl.

    Args:
        old_log_prob: [B, T] nats; the sampler's, by verl's bypass mode. 0 in padding.
        log_prob: [B, T] nats, with a gradient.
        advantages: [B, T].
        response_mask: [B, T] bool.
        loss_agg_mode: any of verl's.
        config: the actor's, whose `policy_loss` is a `DRPOPolicyLossConfig`.
        rollout_is_weights: must be None.

    Returns:
        The scalar to minimise, and figures of the trust region over this micro-batch. verl takes the mean of each over
        an update's micro-batches, the largest and the least too.

    Raises:
        InputError: no `DRPOPolicyLossConfig`, or importance weights in addition to the objective's ratio.

    Example:
        >>> chosen = DRPOPolicyLossConfig(objective="drpo(0.2)", rollout_correction={"bypass_mode": True})
        >>> actor = ActorConfig(strategy="fsdp2", rollout_n=8, ppo_micro_batch_size_per_gpu=1, policy_loss=chosen)
        >>> mu, pi, yes = torch.tensor([[0.4, 1.0]]), torch.tensor([[0.5, 0.9]]), torch.tensor([[True, False]])
        >>> loss, shown = policy_loss(mu.log(), pi.log(), torch.ones(1, 2), yes, config=actor)
        >>> round(loss.item(), 4), round(shown["drpo/prob_diff_mean"], 4)
        (-1.1875, 0.1)
    """
    chosen = None if config is None else config.policy_loss
    if not isinstance(chosen, DRPOPolicyLossConfig):
        raise InputError(f"{FIELD}._target_ is {type(chosen).__name__}, which has no objective: set it to {TARGET}")
    if rollout_is_weights is not None:
        raise InputError(
            f"{CORRECTION}.rollout_is multiplies the loss by importance weights that the objective already contains: "
            f"set {CORRECTION}.rollout_is=null"
        )
    objective = objective_of(chosen.objective, f"{FIELD}.objective")
    tokens = (log_prob, old_log_prob, advantages, response_mask)
    loss = agg_loss(
        loss_mat=token_loss(objective, *tokens),
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **(config.global_batch_info if config is not None else {}),
    )
    region = figures(objective, *tokens)
    values = torch.stack(list(region.values())).tolist()  # a single device sync
    return loss, {f"drpo/{name}": value for name, value in zip(region, values, strict=True)}


register_policy_loss(LOSS)(policy_loss)


def check(config: DictConfig) -> None:
    """Raise for a configuration of verl's trainer in which old_log_prob is not the sampling distribution.

    Args:
        config: the whole configuration, as composed by `verl.trainer.main_ppo`.

    Raises:
        InputError: the first wrong field, with its correct value.

    Example:
        >>> check(OmegaConf.create({"actor_rollout_ref": {"actor": {"policy_loss": {"loss_mode": "vanilla"}}}}))
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: actor_rollout_ref.actor.policy_loss.loss_mode=vanilla is another loss: start it with
        verl.trainer.main_ppo; set actor_rollout_ref.actor.policy_loss.loss_mode=drpo
    """
    for field, sound, what in UNSOUND:
        value = OmegaConf.select(config, field)
        if value not in sound:
            raise InputError(f"{field}={_spelt(value)} {what}; set {field}={_spelt(sound[0])}")
    temperature = OmegaConf.select(config, f"{ROLLOUT}.temperature")
    if not temperature > 0:
        raise InputError(f"{ROLLOUT}.temperature={temperature} samples nothing; set {ROLLOUT}.temperature=1")
    chosen: Any = OmegaConf.to_container(OmegaConf.select(config, FIELD), resolve=True)
    DRPOPolicyLossConfig(**{name: value for name, value in chosen.items() if name != "_target_"})


def _spelt(value: object) -> str:
    """Format a value for verl's command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _check_loss(loss_mode: str) -> None:
    """Raise if verl would compute another loss; its registry is overwritten without a word."""
    if loss_mode != LOSS:
        raise InputError(
            f"{FIELD}.loss_mode={loss_mode} is another loss, and the objective would be ignored; set "
            f"{FIELD}.loss_mode={LOSS}"
        )
    registered = get_policy_loss_fn(LOSS)
    if registered is not policy_loss:
        raise InputError(
            f"verl's registry has {registered.__module__}.{registered.__qualname__} under {LOSS!r}, which would bypass "
            "the objective: register that loss under another name"
        )


def _check_correction(correction: Mapping[str, Any] | None) -> None:
    """Raise unless the correction is plain bypass mode; verl's default is not."""
    if not correction or not correction.get("bypass_mode", False):
        raise InputError(
            f"{FIELD}.rollout_correction.bypass_mode is not true, so old_log_prob is the trainer's, not the sampler's; "
            f"set {CORRECTION}.bypass_mode=true and '+{FIELD}.rollout_correction=${{{CORRECTION}}}'"
        )
    for name in ("rollout_is", "rollout_rs"):
        if correction.get(name) is not None:
            raise InputError(
                f"{CORRECTION}.{name}={correction.get(name)} has no effect in bypass mode; set {CORRECTION}.{name}=null"
            )
