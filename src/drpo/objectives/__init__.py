"""Objectives as pure functions of token log-probabilities; they require torch alone.

Each is a frozen dataclass. Called on `Tokens`, it returns a loss per token with

    d loss / d logp = -A * r * w,   r = pi / mu

Methods differ only in the gradient weight w.
"""

from functools import partial

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
from drpo.spec import Registry
from drpo.types import TokenLoss, Tokens

REGISTRY: Registry[Objective] = Registry(
    "objective",
    {
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
    },
    explicit=frozenset({"drpo"}),  # a spec always states the radius
)
"""Objectives by name.

Example:
    >>> from drpo.spec import format_spec, parse_spec
    >>> parse_spec("drpo(0.2)", REGISTRY)
    DRPO(delta=0.2, power=0.0, outside=None, advantage_weighted=True)
    >>> parse_spec("dropo(0.2)", REGISTRY)
    Traceback (most recent call last):
    ...
    drpo.errors.InputError: unknown objective 'dropo'; did you mean 'drpo'?
    >>> [format_spec(o, REGISTRY) for o in (DRPO(0.2, outside=0.1), DPPO(0.05, divergence="kl"), DRPO())]
    ['drpo(0.2, outside=0.1)', "dppo(0.05, 0.05, 'kl')", 'drpo(12.5)']
    >>> format_spec(ImportanceSampling(), REGISTRY), format_spec(ImportanceSampling(2.0), REGISTRY)
    ('none', 'tis(2.0)')
"""

__all__ = [
    "CISPO",
    "DEFAULT_K",
    "DPPO",
    "DRPO",
    "GSPO",
    "MAX_LOG_RATIO",
    "REGISTRY",
    "SAPO",
    "SPO",
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
    "prob_diff",
    "radii",
    "ratio",
    "reference_kl",
    "reference_kl_advantage",
    "topk_kl",
    "topk_tv",
    "total",
    "vanishes_at_zero_advantage",
]
