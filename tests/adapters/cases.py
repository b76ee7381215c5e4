"""A batch that has everything a framework's batch can have, and what the direct objective makes of it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from drpo import objectives
from drpo.objectives import Tokens, total
from drpo.spec import parse_spec

# One of every kind: no region, ratio, smooth in the ratio, mask, smooth and reachable, smooth and wide.
SPECS = ("none", "ppo(0.2, 0.28)", "spo(0.5)", "dppo(0.15)", "drpo(0.2)", "drpo(12.5)", "cispo(0.2, 0.28)")

# The objectives of 2026: those of tokens, with a factor and a sum among them, and those of whole sequences.
TOKENS_2026 = (
    "ipo(0.3)",
    "icepop(0.5, 5.0)",
    "kpop(0.1)",
    "drpo_eff(0.5)",
    "reinforce*weight('token', 2.0)",
    "ppo(0.2, 0.2)*binary_kl(0.05)",
    "mask(0.1) + 0.002*k2",
)
SEQUENCES_2026 = (
    "cppo(0.2)",
    "vespo",
    "gmpo",
    "reinforce*weight('sequence', 2.0)",
    "ppo(0.2, 0.2)*opsm(0.05)",
    "ppo(0.2, 0.2)*reject('seq_mean_k3', 0.5)",
)
OF_2026 = TOKENS_2026 + SEQUENCES_2026
SEQUENCE = "gspo(0.1, 0.1)"  # an older one of whole sequences, which not every adapter serves
FEW_2026 = ("mask(0.1) + 0.002*k2", "cppo(0.2)")  # trains tokens without an advantage; reads all of a sequence
EVERY = (*SPECS, *FEW_2026, *(pytest.param(s, marks=pytest.mark.slow) for s in OF_2026 if s not in FEW_2026))
UNSERVED_2026 = (  # by any adapter
    "m2po",
    "m2po_areal",
    "clip_cov",
    "kl_cov",
    "none*second_moment(0.04)",
    "topr",
    "ref_kl(0.2) + 0.002*k2",
    "ppo(0.2, 0.2)*proximal",
    "vespo(max_ratio=3.0)",
)


@dataclass(frozen=True)
class Rows:
    """B padded rows of at most T tokens.

    Args:
        logp: [B, T] nats, no gradient.
        behavior_logp: [B, T] nats, 0 in padding.
        advantage: [B].
        keep: [B, T] bool; False in padding, and at a few tokens in between.
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    keep: Tensor


def rows(seed: int = 0, n_rows: int = 4, length: int = 11, dtype: torch.dtype = torch.float32) -> Rows:
    """Rows of unequal length, on both sides of every region, with both signs of the advantage and one of 0."""
    draw = torch.Generator().manual_seed(seed)
    mu = torch.rand(n_rows, length, generator=draw, dtype=torch.float64) ** 2 * 0.98 + 0.01
    pi = (mu + 0.5 * torch.randn(mu.shape, generator=draw, dtype=torch.float64) * mu.sqrt()).clamp(0.002, 0.995)
    advantage = torch.randn(n_rows, generator=draw, dtype=torch.float64)
    advantage[-1] = 0.0
    ends = torch.randint(2, length + 1, (n_rows, 1), generator=draw)
    keep = (torch.arange(length) < ends) & (torch.rand(mu.shape, generator=draw) < 0.9)
    keep[:, 0] = True
    behavior_logp = torch.where(torch.arange(length) < ends, mu.log(), torch.zeros_like(mu))
    return Rows(pi.log().to(dtype), behavior_logp.to(dtype), advantage.to(dtype), keep)


def direct_gradient(spec: str, batch: Rows, weight: Tensor) -> Tensor:
    """d(sum over kept tokens of weight * loss) / d logp, [B, T] float64, by autograd on the objective itself.

    Args:
        spec: of the objective.
        batch: the rows.
        weight: [B, T]; what each token counts in the framework's own sum.
    """
    logp = batch.logp.double().requires_grad_()
    spread = batch.advantage.double().unsqueeze(1).expand(logp.shape)
    sequence = torch.arange(len(logp)).unsqueeze(1).expand(logp.shape)
    columns = (logp, batch.behavior_logp.double(), spread, batch.keep, sequence)
    loss = total(
        parse_spec(spec, objectives.REGISTRY),
        Tokens(*(c.reshape(-1) for c in columns)),
        weight.double().reshape(-1),
    )
    (slope,) = torch.autograd.grad(loss, logp)
    return slope
