"""Objectives as pure functions of token log-probabilities; they require torch alone.

Each is a frozen dataclass. Called on `Tokens`, it returns a loss per token with

    d loss / d logp = -A * r * w,   r = pi / mu

Methods differ only in the gradient weight w.
"""

from functools import partial

from drpo.objectives.clip import GSPO, PPOClip
from drpo.objectives.composed import Decoupled, Product, Proximal, Sum, of_summands, summands
from drpo.objectives.contract import (
    HasBatch,
    HasRegion,
    Objective,
    gradient,
    gradient_weight,
    of_batch,
    reads_batch,
    total,
    vanishes_at_zero_advantage,
)
from drpo.objectives.cppo import CPPO
from drpo.objectives.diagnosis import diagnose
from drpo.objectives.distillation import RefKL
from drpo.objectives.divergence import DEFAULT_K, TOPK, needed_divergence, topk_kl, topk_tv
from drpo.objectives.effective import DRPOEff
from drpo.objectives.factors import OPSM, Band, BinaryKL, Factor, ImportanceWeight, Reject
from drpo.objectives.likelihood import K2, Reinforce
from drpo.objectives.mask import DPPO, IPO, IcePop, KPop, SymmetricMask
from drpo.objectives.quadratic import DRPO, SPO, DivergencePenalty
from drpo.objectives.ratios import MAX_LOG_RATIO, prob_diff, ratio
from drpo.objectives.region import borders, caution, out_of_region, radii
from drpo.objectives.surrogate import CISPO, SAPO, ImportanceSampling
from drpo.objectives.terms import entropy_bonus, reference_kl, reference_kl_advantage
from drpo.objectives.topr import TOPR
from drpo.objectives.whole_batch import M2PO, ClipCov, KLCov, M2POAReaL, SecondMoment
from drpo.objectives.whole_sequences import GMPO, VESPO
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
        "reinforce": Reinforce,
        "ipo": IPO,
        "icepop": IcePop,
        "kpop": KPop,
        "cppo": CPPO,
        "vespo": VESPO,
        "gmpo": GMPO,
        "m2po": M2PO,
        "m2po_areal": M2POAReaL,
        "clip_cov": ClipCov,
        "kl_cov": KLCov,
        "k2": K2,
        "ref_kl": RefKL,
        "topr": TOPR,
        "drpo_eff": DRPOEff,
        # Factors, written behind an objective: none*band(0.5, 5.0)
        "band": Band,
        "reject": Reject,
        "binary_kl": BinaryKL,
        "second_moment": SecondMoment,
        "opsm": OPSM,
        "weight": ImportanceWeight,
        "proximal": Proximal,
    },
    explicit=frozenset({"drpo"}),  # a spec always states the radius
    of_sum=of_summands,
    summands=summands,
)
"""Objectives by name, and the factors of a product.

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
    >>> format_spec(parse_spec("mask(0.1)*opsm(0.5) + 0.002*k2", REGISTRY), REGISTRY)
    'mask(0.1)*opsm(0.5) + 0.002*k2'
"""

__all__ = [
    "CISPO",
    "CPPO",
    "DEFAULT_K",
    "DPPO",
    "DRPO",
    "GMPO",
    "GSPO",
    "IPO",
    "K2",
    "M2PO",
    "MAX_LOG_RATIO",
    "OPSM",
    "REGISTRY",
    "SAPO",
    "SPO",
    "TOPK",
    "TOPR",
    "VESPO",
    "Band",
    "BinaryKL",
    "ClipCov",
    "DRPOEff",
    "Decoupled",
    "DivergencePenalty",
    "Factor",
    "HasBatch",
    "HasRegion",
    "IcePop",
    "ImportanceSampling",
    "ImportanceWeight",
    "KLCov",
    "KPop",
    "M2POAReaL",
    "Objective",
    "PPOClip",
    "Product",
    "Proximal",
    "RefKL",
    "Reinforce",
    "Reject",
    "SecondMoment",
    "Sum",
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
    "of_batch",
    "out_of_region",
    "prob_diff",
    "radii",
    "ratio",
    "reads_batch",
    "reference_kl",
    "reference_kl_advantage",
    "topk_kl",
    "topk_tv",
    "total",
    "vanishes_at_zero_advantage",
]
