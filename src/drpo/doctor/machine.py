"""Checks of the trainer: its optimised paths against the plain path, its memory, and its region."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import at_temperature, chosen_logp, micro_batches, plain_logits, trainer_logp
from drpo.model.activations import is_checkpointed
from drpo.model.master_weights import in_float32
from drpo.model.policy import Policy
from drpo.objectives import DRPO, Objective, caution, radii
from drpo.train.compact_adamw import CompactAdamW
from drpo.train.critic import CriticTrainer
from drpo.train.memory import SHARE, StepShape, estimate_step, free_bytes
from drpo.types import Episode

SAME = 1e-3
"""Accepted difference of a log-probability, or of a gradient relative to its norm, in float32."""


def paths(policy: Policy, completions: Sequence[Episode], with_gradient: bool) -> Finding:
    """Compare shared prompts, packing and fused head with one plain row per completion, in float32, temperature 0.8.

    Args:
        policy: the model in training.
        completions: of one problem, at least two.
        with_gradient: also compare the gradients of all trained weights.
    """
    dtype, policy.dtype = policy.dtype, torch.float32
    try:
        with at_temperature(policy, 0.8), in_float32(policy.model):
            with torch.no_grad():
                ours = torch.cat(trainer_logp(policy, completions))
                plain = torch.cat([_plain_logp(policy, c, z) for c, z in _rows(policy, completions)])
            apart = float((ours - plain).abs().max())
            slope = _gradient_gap(policy, completions) if with_gradient else None
    finally:
        policy.dtype = dtype
    fine = apart <= SAME and (slope is None or slope <= SAME)
    verdict, advice = judge(fine, "this model's attention or head differs from the plain path: please report it")
    return Finding(
        "paths",
        verdict,
        f"{'shared prompts, ' if policy.shares_prompts else ''}packed rows and fused head against plain rows, float32: "
        f"log p apart by at most {apart:.1e}" + ("" if slope is None else f", gradients by {slope:.1e}"),
        f"{SAME:g}",
        advice,
        {"logp": apart} | ({} if slope is None else {"gradient": slope}),
    )


def _rows(policy: Policy, completions: Sequence[Episode]) -> Any:
    return zip(completions, plain_logits(policy, completions), strict=True)


def _plain_logp(policy: Policy, c: Episode, logits: Tensor) -> Tensor:
    return chosen_logp(logits, c.sequence.token_ids, policy.temperature)


def _gradient_gap(policy: Policy, completions: Sequence[Episode]) -> float:
    """Return the largest distance between a weight's gradients by the two paths, relative to their norm."""
    parameters = list(policy.trainable().values())
    objective = DRPO(0.2)
    micros = micro_batches(policy, completions)
    shares = torch.stack([policy.loss(m, objective).loss for m in micros])
    fused = torch.autograd.grad(shares.sum(), parameters, allow_unused=True)
    logp = [_plain_logp(policy, c, z) for c, z in _rows(policy, completions)]
    loss = torch.zeros(())
    for m in micros:
        mine = torch.cat([logp[int(i)] for i in m.row.unique_consecutive()]).to(policy.device)
        loss = loss + (m.weight * objective(m.tokens(mine)).loss).sum().cpu()
    plain = torch.autograd.grad(loss, parameters, allow_unused=True)
    gaps = [
        float((a - b).norm() / b.norm().clamp(min=1e-12))
        for a, b in zip(fused, plain, strict=True)
        if a is not None and b is not None and float(b.norm()) > 1e-6 * _largest(plain)
    ]
    return max(gaps, default=math.nan)


def _largest(gradients: Sequence[Tensor | None]) -> float:
    return max(float(g.norm()) for g in gradients if g is not None)


def region(objective: Objective, prob_diff_p99: float) -> Finding:
    """Whether tokens can leave the region, and how its radius compares to numerical mismatch.

    Args:
        objective: the objective.
        prob_diff_p99: 99th percentile of |pi - mu| at equal weights.
    """
    sides = radii(objective)
    warning = caution(objective)
    known = {} if sides is None else {"radius_low": sides[0], "radius_high": sides[1]}
    border = "no token leaves it" if warning else "radius " + " and ".join(f"{r:g}" for r in known.values())
    verdict, advice = judge(warning is None, warning or "", otherwise="note")
    return Finding(
        "region",
        verdict,
        f"{border if warning or known else 'no radius in probability'}; rounding alone moves one token in a hundred by "
        f"{prob_diff_p99:.3f}",
        "a radius below 1, well above rounding",
        advice,
        {**known, "prob_diff_p99": prob_diff_p99},
    )


def memory(
    policy: Policy, optimizer: torch.optim.Optimizer, shape: StepShape, critic: CriticTrainer | None = None
) -> Finding:
    """Estimate the memory that the largest step needs beyond the memory in use, without running it.

    Args:
        policy: the model in training, before its first step.
        optimizer: of its trainable parameters.
        shape: of the step.
        critic: the critic with its optimiser, before its first step, or None.
    """
    need, free = estimate_step(policy, optimizer, shape, critic), free_bytes(policy.device)
    again = is_checkpointed(policy.model)
    advice = "lower --micro-batch-tokens or --prompts, train adapters (--lora-rank 16) or another model"
    if need.optimiser > need.total / 4 and not isinstance(optimizer, CompactAdamW):
        advice = f"set --optimizer 'adamw8bit(...)', {advice}"
    verdict, advice = judge(
        need.total <= SHARE * free, advice if again else f"set --checkpoint-activations on, {advice}"
    )
    gib = {name: value / 2**30 for name, value in vars(need).items()}
    of_critic = "" if critic is None else f"those of the critic {gib['critic']:.1f}, "
    return Finding(
        "memory",
        verdict,
        f"the largest step needs {need.total / 2**30:.1f} GiB more (gradient and optimiser {gib['optimiser']:.1f}, "
        f"{of_critic}{need.positions} positions{', layers computed again,' if again else ''} {gib['activations']:.1f}, "
        f"head {gib['head']:.1f}, keys and values of {shape.rows} rows {gib['cache']:.1f})",
        f"{free / 2**30:.1f} GiB free",
        advice,
        {"need_bytes": need.total, "free_bytes": free},
    )
