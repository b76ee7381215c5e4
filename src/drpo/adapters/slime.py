"""Any objective in slime: `--loss-type custom_loss --custom-loss-function-path drpo.adapters.slime.loss`.

Experimental. slime needs Megatron and GPUs: the tests run with a stand-in for its `policy_loss_function`, written from
its documented formula, and a list of the names that this file relies on.

slime calls `loss` on every rank. `loss` calls slime's `policy_loss_function` and replaces only the function that turns
ratios and advantages into a loss per token; log-probabilities, masks, reduction, KL and entropy stay slime's. Set the
objective in the file of `--custom-config-path`: `drpo_objective: drpo(0.2)`.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from slime.backends.megatron_utils import loss as framework
from torch import Tensor

from drpo.adapters.weighing import loss_tokens_key, objective_of, token_loss
from drpo.errors import InputError
from drpo.objectives import Objective, out_of_region
from drpo.objectives.contract import unchecked

MUST_BE = {
    "use_tis": (False, "leave out --use-tis, which multiplies the loss by another ratio"),
    "get_mismatch_metrics": (False, "leave out --get-mismatch-metrics, which multiplies the loss by another ratio"),
    "use_opsm": (False, "leave out --use-opsm, which is a trust region of its own"),
    "use_score_centering": (False, "leave out --use-score-centering, which adds a term of its own"),
    "eps_clip_c": (None, "leave out --eps-clip-c, which is a trust region of its own"),
    "rollout_top_p": (1.0, "--rollout-top-p must be 1, or the sampler's probabilities are not the policy's"),
    "rollout_top_k": (-1, "--rollout-top-k must be -1, or the sampler's probabilities are not the policy's"),
}
OTHER_LOSSES = ("gspo", "cispo")


def loss(
    args: Namespace, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return slime's policy loss with the objective as its loss per token, and slime's metrics with "drpo/..." added.

    Args:
        args: slime's; `drpo_objective` is read here.
        batch: slime's; `rollout_log_probs` and `loss_masks`, a tensor per sample, are read here.
        logits: [1, T, V].
        sum_of_sample_mean: slime's reduction, which applies the masks.

    Returns:
        The loss, with the objective's value and gradient, and scalars by name.

    Raises:
        InputError: `drpo_objective` missing or unknown, or an incompatible flag.
    """
    objective = objective_of(getattr(args, "drpo_objective", None), "drpo_objective")
    check(args, objective)
    if not batch.get("rollout_log_probs"):
        raise InputError("rollout_log_probs is missing: a custom generate function must return the sampler's")
    behavior = batch["rollout_log_probs"]
    sequence = torch.cat([torch.full_like(one, i, dtype=torch.long) for i, one in enumerate(behavior)])
    behavior_logp = torch.cat(list(behavior))
    whole_sequences = getattr(args, "context_parallel_size", 1) == 1
    masks = batch["loss_masks"] if whole_sequences else [torch.ones_like(one) for one in behavior]
    keep = torch.cat(list(masks)).bool()
    calls: list[dict[str, Tensor]] = []

    def per_token(ppo_kl: Tensor, advantages: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        logp = behavior_logp - ppo_kl
        value = token_loss(objective, logp, behavior_logp, advantages, keep, sequence)
        here = {"logp": logp.detach(), "behavior_logp": behavior_logp, "advantage": advantages, "keep": keep}
        left = out_of_region(objective, unchecked(**here, sequence=sequence, divergence=None))
        columns = {"prob_diff_mean": (logp.detach().exp() - behavior_logp.exp()).abs()}
        calls.append(columns if left is None else {**columns, "out_of_region": left.to(logp.dtype)})
        return value, torch.zeros_like(value) if left is None else left.to(logp.dtype)

    original = framework.compute_policy_loss
    framework.compute_policy_loss = per_token
    try:
        total, metrics = framework.policy_loss_function(args, batch, logits, sum_of_sample_mean)
    finally:
        framework.compute_policy_loss = original
    if len(calls) != 1:
        raise InputError(
            "slime's policy_loss_function did not call compute_policy_loss, so the objective was not used: this "
            "version of slime, or its kind of policy loss, is not supported"
        )
    reduced = {f"drpo/{name}": sum_of_sample_mean(each).detach() for name, each in calls[0].items()}
    return total, metrics | reduced | {f"drpo/{loss_tokens_key(objective)}": keep.sum().to(behavior_logp.dtype)}


def check(args: Namespace, objective: Objective) -> None:
    """Raise InputError, naming the flag, for arguments with which the loss would not be the objective's."""
    if not getattr(args, "use_rollout_logprobs", False):
        raise InputError("--use-rollout-logprobs is not given: without it the ratio is not to the sampler")
    for name, (wanted, fix) in MUST_BE.items():
        value = getattr(args, name, wanted)
        if value != wanted:
            raise InputError(f"{name}={value}: {fix}")
    estimator = getattr(args, "advantage_estimator", "grpo")
    if estimator in OTHER_LOSSES:
        raise InputError(
            f"--advantage-estimator {estimator} has a policy loss of its own: write grpo, and "
            f"drpo_objective: {estimator}(...) where you want its loss"
        )
    n_ranks = getattr(args, "context_parallel_size", 1)
    if n_ranks != 1 and not objective.tokenwise:
        raise InputError(
            f"--context-parallel-size {n_ranks}: must be 1 with {type(objective).__name__}, which needs whole sequences"
        )
