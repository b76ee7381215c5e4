"""Objectives as pure functions of token log-probabilities; torch is all they need.

Every one is a frozen dataclass, called on `Tokens`, that returns a loss per token with

    d loss / d logp = -A * r * w,   r = pi / mu

and the methods differ only in the gradient weight w.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from drpo.objectives.clip import GSPO, PPOClip
from drpo.objectives.contract import (
    MAX_LOG_RATIO,
    HasRegion,
    Objective,
    gradient,
    gradient_weight,
    prob_diff,
    ratio,
    total,
    vanishes_at_zero_advantage,
)
from drpo.objectives.diagnosis import diagnose
from drpo.objectives.divergence import DEFAULT_K, TOPK, needed_divergence, topk_kl, topk_tv
from drpo.objectives.mask import DPPO, SymmetricMask
from drpo.objectives.quadratic import DRPO, SPO, DivergencePenalty
from drpo.objectives.region import borders, caution, out_of_region, radii
from drpo.objectives.surrogate import CISPO, SAPO, ImportanceSampling
from drpo.objectives.terms import entropy_bonus, reference_kl, reference_kl_advantage
from drpo.spec import format_call, parse_any
from drpo.types import TokenLoss, Tokens

TABLE: Mapping[str, Callable[..., Any]] = {
    "none": partial(ImportanceSampling, None),
    "tis": ImportanceSampling,
    "ppo": PPOClip,
    "spo": SPO,
    "dppo": DPPO,
    "drpo": DRPO,
    "cispo": CISPO,
    "gspo": GSPO,
    "sapo": SAPO,
    "mask": SymmetricMask,
    "penalty": DivergencePenalty,
}
"""What each spelled name makes."""


def parse(text: str) -> Objective:
    """Build the objective that `text` spells; it is parsed, never evaluated.

    Args:
        text: `none`, `tis(c)`, `ppo(low,high)`, `spo(e)`, `dppo(d)`, `drpo(d)`, ... or `module:name` for one's own.

    Returns:
        The objective.

    Raises:
        InputError: an unknown name (the nearest one is named), or parameters that it refuses.

    Example:
        >>> parse("drpo(0.2)")
        DRPO(delta=0.2, power=0.0, outside=None, advantage_weighted=True)
        >>> parse("dropo(0.2)")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: unknown objective 'dropo'; did you mean 'drpo'?
    """
    objective: Objective = parse_any(text, TABLE, "objective")
    return objective


def spell(objective: Objective) -> str:
    """Write an objective as `parse` reads it.

    Example:
        >>> spell(DRPO(0.2)), spell(DRPO(0.2, outside=0.1)), spell(DPPO(0.05, divergence="kl"))
        ('drpo(0.2)', 'drpo(0.2, outside=0.1)', "dppo(0.05, 0.05, 'kl')")
        >>> spell(ImportanceSampling()), spell(ImportanceSampling(2.0)), spell(DRPO())
        ('none', 'tis(2.0)', 'drpo(12.5)')
    """
    if objective == ImportanceSampling():
        return "none"
    if objective == DRPO():
        return "drpo(12.5)"  # a radius is too important to go unsaid
    return format_call(objective, TABLE, "objective")


__all__ = [
    "CISPO",
    "DEFAULT_K",
    "DPPO",
    "DRPO",
    "GSPO",
    "MAX_LOG_RATIO",
    "SAPO",
    "SPO",
    "TABLE",
    "TOPK",
    "DivergencePenalty",
    "HasRegion",
    "ImportanceSampling",
    "Objective",
    "PPOClip",
    "SymmetricMask",
    "TokenLoss",
    "Tokens",
    "borders",
    "caution",
    "diagnose",
    "entropy_bonus",
    "gradient",
    "gradient_weight",
    "needed_divergence",
    "out_of_region",
    "parse",
    "prob_diff",
    "radii",
    "ratio",
    "reference_kl",
    "reference_kl_advantage",
    "spell",
    "topk_kl",
    "topk_tv",
    "total",
    "vanishes_at_zero_advantage",
]
