"""Checks of the trainer: its optimised paths against the plain path, its memory, and its region."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import at_temperature, chosen_logp, micro_batches, plain_logits, trainer_logp
from drpo.model.critic import Critic
from drpo.model.policy import Policy
from drpo.objectives import DRPO, Objective, caution, radii
from drpo.ops.chunk_logits import CHUNK_BYTES
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
        with at_temperature(policy, 0.8):
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


@dataclass(frozen=True)
class _Need:
    """Bytes by purpose."""

    optimiser: int
    critic: int
    activations: int
    head: int
    cache: int

    @property
    def total(self) -> int:
        return self.optimiser + self.critic + max(self.activations + self.head, self.cache)


def memory(
    policy: Policy,
    completions: Sequence[Episode],
    *,
    micro_batch_tokens: int,
    rows: int,
    row_tokens: int,
    critic: Critic | None = None,
) -> Finding:
    """Estimate the memory that the largest step needs beyond the memory in use, without running it.

    Saved activations are measured on two small micro-batches and extrapolated linearly in the number of positions.

    Args:
        policy: the model in training, before its first step.
        completions: of one problem, at least four.
        micro_batch_tokens: the largest number of positions in a micro-batch.
        rows: number of completions sampled together.
        row_tokens: length of the longest prompt plus completion.
        critic: the critic, before its first step, or None.
    """
    small, large = _kept(policy, completions[:2]), _kept(policy, completions)
    per_position = (large[1] - small[1]) / max(1, large[0] - small[0])
    held = CHUNK_BYTES.get(policy.device.type, 2**30)
    need = _Need(
        optimiser=_optimiser_bytes(policy),
        # The critic runs after the policy and saves the same activations, without the head.
        critic=0 if critic is None else _optimiser_bytes(critic),
        activations=int(small[1] + max(0.0, per_position) * max(0, micro_batch_tokens - small[0])),
        head=3 * held,
        cache=rows * row_tokens * _cache_bytes(policy),
    )
    free = _free(policy.device)
    verdict, advice = judge(
        need.total <= 0.9 * free,
        "lower --micro-batch-tokens or --prompts, train adapters (--lora-rank 16) or another model",
    )
    of_critic = "" if critic is None else f"those of the critic {need.critic / 2**30:.1f}, "
    gib = {name: value / 2**30 for name, value in vars(need).items()}
    return Finding(
        "memory",
        verdict,
        f"the largest step needs {need.total / 2**30:.1f} GiB more (gradient and optimiser {gib['optimiser']:.1f}, "
        f"{of_critic}{micro_batch_tokens} positions {gib['activations']:.1f}, head {gib['head']:.1f}, "
        f"keys and values of {rows} rows {gib['cache']:.1f})",
        f"{free / 2**30:.1f} GiB free",
        advice,
        {"need_bytes": need.total, "free_bytes": free},
    )


def _kept(policy: Policy, completions: Sequence[Episode]) -> tuple[int, int]:
    """Return the positions of completions as one micro-batch, and the bytes that autograd saves, without weights."""
    (micro,) = micro_batches(policy, completions, micro_batch_tokens=2**30)
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that holds its own output would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = policy.loss(micro, DRPO(0.2)).loss
    del loss
    return micro.layout.n_positions, sum(sizes.values())


def _optimiser_bytes(model: Policy | Critic) -> int:
    """Return the bytes of the gradient and AdamW's two moments."""
    return sum(3 * p.numel() * p.element_size() for p in model.trainable().values())


def _cache_bytes(policy: Policy) -> int:
    """Return the bytes of one token's keys and values in the sampler."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    if not heads:  # recurrent layers alone
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * 2)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_limit()
    return available if limit is None else min(available, limit - psutil.Process().memory_info().rss)


def _cgroup_limit() -> int | None:
    """Return the container's memory limit in bytes, or None."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
