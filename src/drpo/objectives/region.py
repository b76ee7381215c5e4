"""An objective's trust region: the tokens outside, its borders, and whether a token can reach them."""

import math
from typing import TypeGuard

import torch
from torch import Tensor

from drpo.objectives.contract import HasRegion, Objective
from drpo.objectives.divergence import needed_divergence
from drpo.types import Tokens

BISECTIONS = 60
"""Halvings of an interval of probabilities, enough for float64."""

FAR = {"topk_tv": 1.0, "topk_kl": math.inf}
"""The supremum of each divergence."""


def out_of_region(objective: Objective, tokens: Tokens) -> Tensor | None:
    """Return [T] bool, True where the policy has left the objective's region; None without a region.

    Args:
        objective: any objective; its optional method `out_of_region(tokens)` is called.
        tokens: T tokens.

    Example:
        >>> from drpo.objectives import DRPO, ImportanceSampling
        >>> pi, one = torch.tensor([0.5, 0.7]), torch.ones(2)
        >>> tokens = Tokens(pi.log(), (0.4 * one).log(), one, one.bool(), one.long())
        >>> out_of_region(DRPO(0.2), tokens), out_of_region(ImportanceSampling(), tokens)
        (tensor([False,  True]), None)
    """
    return objective.out_of_region(tokens) if isinstance(objective, HasRegion) else None


def has_region(objective: Objective) -> TypeGuard[HasRegion]:
    """Return whether the objective has a region; a product or a sum has one where a part of it has.

    Example:
        >>> from drpo.objectives import DRPO, ImportanceSampling
        >>> has_region(DRPO(0.2)), has_region(ImportanceSampling())
        (True, False)
    """
    kind = needed_divergence(objective.needs)
    one = torch.ones(1)
    probe = _tokens(one, one, None if kind is None else one)
    return out_of_region(objective, probe) is not None


def has_borders(objective: Objective) -> TypeGuard[HasRegion]:
    """Return whether the objective's region depends on a token's pi and mu alone, as `borders` requires.

    Example:
        >>> from drpo.objectives import DRPO, ImportanceSampling
        >>> has_borders(DRPO(0.2)), has_borders(ImportanceSampling())
        (True, False)
    """
    return not objective.needs and objective.tokenwise and has_region(objective)


def borders(objective: Objective, mu: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the probabilities pi at which a token leaves the region, below and above mu.

    They are found by bisection of `out_of_region`, which assumes that a token outside stays outside as it moves on.

    Args:
        objective: any objective.
        mu: [N] float64 in (0, 1].

    Returns:
        Two tensors [N], NaN where a token cannot leave the region on that side; None without a region that depends on a
        token's pi and mu alone (top-K divergences and sequence ratios depend on more).

    Example:
        >>> from drpo.objectives import DRPO, PPOClip
        >>> mu = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        >>> [side.round(decimals=2).tolist() for side in borders(DRPO(0.2), mu)]
        [[nan, 0.3, 0.7], [0.3, 0.7, nan]]
        >>> [side.round(decimals=2).tolist() for side in borders(PPOClip(0.2, 0.28), mu)]
        [[0.08, 0.4, 0.72], [0.13, 0.64, nan]]
    """
    if not has_borders(objective):
        return None
    ends = torch.cat([torch.zeros_like(mu), torch.ones_like(mu)])
    below, above = _border(objective, mu.repeat(2), ends).chunk(2)
    return below, above


def _border(objective: HasRegion, mu: Tensor, end: Tensor) -> Tensor:
    """Return where a token leaves the region between mu and `end`, [N]; NaN where `end` is inside."""
    inside, outside = mu, end
    reachable = objective.out_of_region(_tokens(mu, end))
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        out = objective.out_of_region(_tokens(mu, middle))
        inside, outside = torch.where(out, inside, middle), torch.where(out, middle, outside)
    return torch.where(reachable, outside, torch.nan)


def _tokens(mu: Tensor, pi: Tensor, divergence: Tensor | None = None) -> Tokens:
    """Return tokens with these probabilities, each a sequence by itself."""
    n = torch.arange(len(mu))
    keep = torch.ones_like(n, dtype=torch.bool)
    one, given = torch.ones_like(mu), {"proximal_logp": mu.log(), "reference_logp": mu.log()}
    return Tokens(pi.log(), mu.log(), one, keep, n, divergence, score=one, **given)


def radii(objective: Objective) -> tuple[float, float] | None:
    """Return the region's radii below and above mu, in units of probability, if they are the same for every mu.

    Example:
        >>> from drpo.objectives import DPPO, DRPO, PPOClip
        >>> [radii(o) for o in (DRPO(0.2), DPPO(0.1, 0.3), PPOClip(), DRPO(12.5))]
        [(0.2, 0.2), (0.1, 0.3), None, None]
    """
    mu = torch.logspace(-4, -0.001, 50, dtype=torch.float64)
    edges = borders(objective, torch.cat([mu, 1 - mu]))
    if edges is None:
        return None
    sides = [(side - torch.cat([mu, 1 - mu])).abs() for side in edges]
    known = [side[side.isfinite()] for side in sides]
    if any(len(side) < 2 or float(side.max() - side.min()) > 1e-6 for side in known):
        return None
    low, high = (round(float(side.median()), 6) for side in known)
    return low, high


def caution(objective: Objective) -> str | None:
    """Return a warning if no token can leave the objective's region, so that the region has no effect; else None.

    Example:
        >>> from drpo.objectives import DRPO
        >>> caution(DRPO(0.2)), caution(DRPO(12.5))
        (None, 'no token can leave the region, since no token can shift by 1 or more in probability: nothing is ever \
held or pulled back (a delta that can be reached: 0.1 to 0.6)')
    """
    if not has_region(objective):
        return None
    mu = torch.logspace(-6, 0, 60, dtype=torch.float64)[:-1]
    kind = needed_divergence(objective.needs)
    far = None if kind is None else torch.full_like(mu, FAR[kind])
    ends = (torch.zeros_like(mu), torch.ones_like(mu))
    if any(bool(objective.out_of_region(_tokens(mu, end, far)).any()) for end in ends):
        return None
    return (
        "no token can leave the region, since no token can shift by 1 or more in probability: nothing is ever held or "
        "pulled back (a delta that can be reached: 0.1 to 0.6)"
    )
