"""The radius of an objective's region in units of probability, and whether any token can ever reach it."""

from torch import Tensor

from drpo.objectives.contract import Objective, shift
from drpo.types import Tokens

DEFAULT_RADIUS = 0.15
"""DPPO's Binary-TV threshold: the yardstick for objectives that have no radius in units of probability."""


def region_radius(objective: Objective) -> float:
    """Return the radius of an objective's region as a shift of probability, or 0.15 where it has none.

    Args:
        objective: any.

    Returns:
        A shift |pi - mu|; above 1 for a region that no token can leave.

    Example:
        >>> from drpo.objectives import DPPO, DRPO, PPOClip
        >>> [region_radius(o) for o in (DRPO(0.2), DPPO(0.3), DPPO(0.05, divergence="kl"), PPOClip())]
        [0.2, 0.3, 0.15, 0.15]
    """
    if getattr(objective, "divergence", "tv") not in ("tv", "topk_tv") or getattr(objective, "power", 0.0) != 0:
        return DEFAULT_RADIUS
    return _delta(objective)


def _delta(objective: Objective) -> float:
    """The radius in the objective's own unit."""
    return float(getattr(objective, "delta", getattr(objective, "delta_low", DEFAULT_RADIUS)))


def outside(objective: Objective, tokens: Tokens) -> Tensor:
    """Return, [T] bool, where the policy has left the objective's region.

    Judged by the divergence that the objective reads, where it reads one, else by |pi - mu| and `region_radius`.

    Args:
        objective: any.
        tokens: T tokens.

    Example:
        >>> import torch
        >>> from drpo.objectives import DRPO
        >>> pi, one = torch.tensor([0.5, 0.7]), torch.ones(2)
        >>> outside(DRPO(0.2), Tokens(pi.log(), (0.4 * one).log(), one, one.bool(), one.long()))
        tensor([False,  True])
    """
    if objective.needs and tokens.divergence is not None:
        return tokens.divergence > _delta(objective)
    return shift(tokens).abs() > region_radius(objective)


def caution(objective: Objective) -> str | None:
    """Return one line where an objective's radius is 1 or more, so that its trust region does nothing; else None.

    Example:
        >>> from drpo.objectives import DRPO
        >>> caution(DRPO(0.2)), caution(DRPO(12.5))
        (None, 'delta = 12.5 is a shift of probability, and no token can shift by 1 or more: none reaches the \
boundary, and nothing is ever held or pulled back (a radius that can be reached: 0.1 to 0.6)')
    """
    radius = region_radius(objective)
    if radius < 1:
        return None
    return (
        f"delta = {radius:g} is a shift of probability, and no token can shift by 1 or more: none reaches the "
        "boundary, and nothing is ever held or pulled back (a radius that can be reached: 0.1 to 0.6)"
    )
