"""The exact bias of each objective's expected gradient, along a path away from the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives import REGISTRY, Objective
from drpo.spec import format_spec
from exact.bandit import Bandit, bandit, bias, distance, zipf

DRIFTS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
"""Total variations between mu and pi at which the bias is taken."""

UNBIASED = 1e-10
"""Below this a relative bias is rounding."""


@dataclass(frozen=True)
class Drift:
    """An objective's bias along a path away from the sampler.

    Args:
        objective: its spec.
        tv: total variation at each point.
        relative: |expected step - true gradient| / |true gradient| at each.
        cosine: between them.
        onset: largest tv up to which it is unbiased; None where it is biased even at pi = mu.
        order: k of bias ~ tv^k near pi = mu; None where it is unbiased there, or biased at pi = mu itself.
    """

    objective: str
    tv: tuple[float, ...]
    relative: tuple[float, ...]
    cosine: tuple[float, ...]
    onset: float | None
    order: float | None


def tilted(problem: Bandit, direction: Tensor, tv: float) -> Tensor:
    """Return the logits log mu + t direction at total variation `tv` from mu, by bisection of t >= 0.

    With the mean advantage for the direction this is the way of an unregularised policy in natural-gradient steps.

    Args:
        problem: a bandit.
        direction: [C, V].
        tv: in [0, 1).

    Raises:
        InputError: the path ends before it is that far.

    Example:
        >>> b = bandit(torch.tensor([0.5, 0.5]), torch.zeros(2))
        >>> torch.softmax(tilted(b, torch.tensor([[1.0, 0.0]]).double(), 0.25), -1)
        tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    low, high = 0.0, 1.0
    while distance(problem, problem.behavior_logp + high * direction).tv < tv:
        high *= 2
        if high > 1e6:
            raise InputError(f"tv={tv}: no distribution on the path is that far from mu")
    for _ in range(60 if tv > 0 else 0):
        middle = (low + high) / 2
        if distance(problem, problem.behavior_logp + middle * direction).tv < tv:
            low = middle
        else:
            high = middle
    return problem.behavior_logp + low * direction


def drifting(vocab_size: int = 50, seed: int = 0) -> Bandit:
    """Return the bandit of the drift figures: Zipf's law, normal rewards."""
    generator = torch.Generator().manual_seed(seed)
    return bandit(zipf(vocab_size), torch.randn(vocab_size, generator=generator, dtype=torch.float64))


def drift(
    objectives: Sequence[Objective], problem: Bandit | None = None, tvs: Sequence[float] = DRIFTS
) -> tuple[Drift, ...]:
    """Return each objective's bias as the policy drifts the way of the advantages.

    Args:
        objectives: any.
        problem: default `drifting()`.
        tvs: rising, the first 0.
    """
    problem = problem or drifting()
    direction = (problem.chance * problem.advantage).sum(0)
    path = [tilted(problem, direction, tv) for tv in tvs]
    drifts = []
    for objective in objectives:
        biases = [bias(objective, problem, logits) for logits in path]
        relative = tuple(b.relative for b in biases)
        clean = [tv for tv, b in zip(tvs, relative, strict=True) if b < UNBIASED]
        onset = max(clean) if relative[0] < UNBIASED else None
        smooth = onset == 0.0 and relative[1] > UNBIASED
        order = _order(tvs[1:4], relative[1:4]) if smooth else None
        drifts.append(
            Drift(format_spec(objective, REGISTRY), tuple(tvs), relative, tuple(b.cosine for b in biases), onset, order)
        )
    return tuple(drifts)


def _order(tvs: Sequence[float], biases: Sequence[float]) -> float:
    x, y = (torch.tensor(column, dtype=torch.float64).log() for column in (tvs, biases))
    return float((y[-1] - y[0]) / (x[-1] - x[0]))
