"""The golden vectors of other frameworks' programs of 2026: each entry as one of our objectives and its formula."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drpo.objectives import (
    CISPO,
    CPPO,
    DPPO,
    GMPO,
    GSPO,
    IPO,
    K2,
    M2PO,
    OPSM,
    TOPR,
    VESPO,
    Band,
    BinaryKL,
    ClipCov,
    Decoupled,
    DRPOEff,
    IcePop,
    ImportanceSampling,
    ImportanceWeight,
    KLCov,
    KPop,
    M2POAReaL,
    Objective,
    PPOClip,
    Product,
    RefKL,
    Reinforce,
    Reject,
    SecondMoment,
    Sum,
    SymmetricMask,
)
from support import reference
from support.reference import Rule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "objectives_2026.json").read_text())
UNCAPPED = 1e9
"""In place of no cap: no ratio of the file reaches it."""


class Ours(NamedTuple):
    """An entry as ours.

    Args:
        objective: ours.
        rule: its formula.
        same_value: whether the loss is the program's too, not its gradient alone.
        per_sequence: whether the program divides by the sequence's tokens, which is a reduction here.
        tolerance: times the usual one.
        masked_count: whether masked tokens take their place in the sequence: kept tokens of A = 0 here.
    """

    objective: Objective
    rule: Rule
    same_value: bool = True
    per_sequence: bool = False
    tolerance: float = 1.0
    masked_count: bool = False


Params = Mapping[str, Any]


def cppo(p: Params) -> Ours:
    parts = (p["delta"], p["w_min"], p["delta_b"], p.get("horizon"), p.get("max_ratio"))
    same_value, all_count = "max_ratio" not in p, p["prefix"] == "all"
    return Ours(CPPO(*parts), reference.cppo(*parts), same_value, masked_count=all_count)


def rollout_correction(p: Params) -> Ours:
    factors, rules = [], []
    if "rollout_is" in p:
        low, _, high = str(p["rollout_is_threshold"]).rpartition("_")
        given = {"cap": None, "low": float(low), "high": float(high)} if low else {"cap": float(high)}
        given["normalize"] = p.get("rollout_is_batch_normalize", False)
        factors.append(ImportanceWeight(p["rollout_is"], **given))
        rules.append(reference.weight(p["rollout_is"], **given))
    names, bounds = p.get("rollout_rs", ""), str(p.get("rollout_rs_threshold", ""))
    for name, bound in zip(names.split(","), bounds.split(","), strict=True) if names else ():
        low, _, high = bound.rpartition("_")
        factors.append(Reject(name, float(high), float(low or 0)))
        rules.append(reference.reject(name, float(high), float(low or 0)))
    if p["loss"] == "reinforce":
        return Ours(Product(Reinforce(), tuple(factors)), reference.product(reference.reinforce(), *rules))
    clip = (p["low"], p["high"], p["dual"])
    return Ours(Product(PPOClip(*clip), tuple(factors)), reference.product(reference.ppo_clip(*clip), *rules))


def with_k2(objective: Objective, rule: Rule, coefficient: float, same_value: bool = True) -> Ours:
    return Ours(
        Sum(((1.0, objective), (coefficient, K2()))),
        reference.added((1.0, rule), (coefficient, reference.k2())),
        same_value,
    )


def dppo_kl(p: Params) -> Ours:
    low, high = p["delta_low"], p["delta_high"]
    rule = reference.dppo(low, high, "tv", UNCAPPED)
    return with_k2(DPPO(low, high, max_ratio=UNCAPPED), rule, 2 * p["kl_tau"], same_value=False)


def ppo_prime(p: Params) -> Ours:
    clip = (1 - p["ratio_low"], p["ratio_high"] - 1, None, p["max_ratio"])
    return Ours(PPOClip(*clip), reference.ppo_clip(*clip))


def masked_is(p: Params) -> Ours:
    bands = [
        (p["token_mask_low"], p["token_mask_high"], "token"),
        (p["geo_mask_low"], p["geo_mask_high"], "geometric"),
        (p["sequence_mask_low"], p["sequence_mask_high"], "every"),
    ]
    whole = p["ratio_type"] == "sequence"
    over = ("sequence", p["sequence_clip_high"]) if whole else ("token", UNCAPPED)
    factors = (ImportanceWeight(*over), *(Band(*band) for band in bands))
    rules = [reference.weight(*over), *(reference.band(*band) for band in bands)]
    terms: list[tuple[float, Objective]] = [(1.0, Product(Reinforce(), factors))]
    formula = [(1.0, reference.product(reference.reinforce(), *rules))]
    if p["kl_tau"]:
        terms.append((p["kl_tau"], Product(K2(), factors)))
        formula.append((p["kl_tau"], reference.product(reference.k2(), *rules)))
    return Ours(Sum(tuple(terms)), reference.added(*formula), same_value=False, per_sequence=whole)


def opsm(p: Params) -> Ours:
    clip = (p["clip_low"], p["clip_high"])
    return Ours(
        Product(PPOClip(*clip), (OPSM(p["delta"]),)),
        reference.product(reference.ppo_clip(*clip), reference.opsm(p["delta"])),
    )


def opsm_decoupled(p: Params) -> Ours:
    clip = (p["clip_low"], p["clip_high"])
    return Ours(
        Decoupled(Product(PPOClip(*clip), (OPSM(p["delta"]),))),
        reference.decoupled(reference.product(reference.ppo_clip(*clip), reference.opsm(p["delta"]))),
    )


def decoupled(clip: tuple[Any, ...], weight: tuple[Any, ...] | None, band: tuple[Any, ...] | None = None) -> Ours:
    """PPO around the proximal policy, with a weight and a band between it and the sampler."""
    factors = [ImportanceWeight(*weight)] if weight else []
    rules = [reference.weight(*weight)] if weight else []
    factors += [Band(*band)] if band else []
    rules += [reference.band(*band)] if band else []
    return Ours(Decoupled(PPOClip(*clip), tuple(factors)), reference.decoupled(reference.ppo_clip(*clip), *rules))


def areal(p: Params) -> Ours:
    weight = {
        None: None,
        "clamp": ("token", p.get("cap")),
        "mask": ("token", None, 0.0, p.get("cap")),
        "sequence_mask": ("geometric", None, p.get("min"), p.get("cap")),
    }[p["behave"]]
    return decoupled((p["low"], p["high"], p["dual"]), weight)


def kpop_decoupled(p: Params) -> Ours:
    clip = clip_of(p)
    factors = (ImportanceWeight("token", UNCAPPED), BinaryKL(p["delta"]))
    rules = (reference.weight("token", UNCAPPED), reference.both_ways(p["delta"]))
    return Ours(Decoupled(PPOClip(*clip), factors), reference.decoupled(reference.ppo_clip(*clip), *rules))


def m2po_areal_decoupled(p: Params) -> Ours:
    clip, mask = clip_of(p), SecondMoment(p["threshold"])
    rule = reference.decoupled(reference.ppo_clip(*clip), reference.second_moment(p["threshold"]))
    return Ours(Decoupled(PPOClip(*clip), (mask,)), rule)


def vespo_decoupled(p: Params) -> Ours:
    shape = [p[k] for k in ("k_positive", "lambda_positive", "k_negative", "lambda_negative", "cap")]
    return Ours(VESPO(*shape), reference.vespo(*shape), same_value=False, tolerance=10.0)


def topr(p: Params) -> Ours:
    parts = (p["positive_weight"], p["negative_weight"])
    return Ours(TOPR(*parts), reference.topr(*parts))


def drpo_eff(p: Params) -> Ours:
    ours = {"min": "low", "max": "high", "lambda": "mass"}
    parts = {ours.get(name, name): value for name, value in p.items()}
    if parts["map"] == "clip":  # which ignores the movement there, and refuses it here
        parts["metric"] = "log_ratio"
    return Ours(DRPOEff(**parts), reference.drpo_eff(**parts))


def clip_of(p: Params) -> tuple[float, float]:
    return p["clip_low"], p["clip_high"]


def banded(low: float, high: float, over: str) -> Ours:
    return Ours(
        Product(ImportanceSampling(), (Band(low, high, over),)),
        reference.product(reference.importance_sampling(), reference.band(low, high, over)),
    )


def gmpo(p: Params) -> Ours:
    # The program's eps of 1e-8 beside the sequence's length; a program without it has the same entries.
    tolerance = 1.0 if p["eps"] == 0 else 100.0
    return Ours(GMPO(p["low"], p["high"]), reference.gmpo(p["low"], p["high"]), per_sequence=True, tolerance=tolerance)


def m2po(p: Params) -> Ours:
    parts = (p["budget"], p["floor_low"], p["floor_high"])
    return Ours(M2PO(*parts), reference.m2po(*parts))


def clip_cov(p: Params) -> Ours:
    parts = (p["low"], p["high"], p["fraction"], p["cov_low"], p["cov_high"])
    return Ours(ClipCov(*parts), reference.clip_cov(p["low"], p["high"], p["cov_low"], p["cov_high"]))


OURS: Mapping[str, Callable[[Params], Ours]] = {
    "CPPO": cppo,
    "CPPO(verl)": cppo,
    "DPPO": lambda p: Ours(
        DPPO(p["delta_low"], p["delta_high"], max_ratio=UNCAPPED),
        reference.dppo(p["delta_low"], p["delta_high"], "tv", UNCAPPED),
        same_value=False,
    ),
    "GMPO": gmpo,
    "DRO": lambda p: with_k2(Reinforce(), reference.reinforce(), p["beta"]),
    "Kimi15": lambda p: with_k2(Reinforce(), reference.reinforce(), p["tau"]),
    "ClipCov": clip_cov,
    "KLCov": lambda p: Ours(KLCov(p["fraction"], p["coefficient"]), reference.kl_cov(p["fraction"], p["coefficient"])),
    "RolloutCorrection": rollout_correction,
    "IPO+KL": lambda p: with_k2(SymmetricMask(p["delta"]), reference.symmetric_mask(p["delta"]), 2 * p["kl_tau"]),
    "DPPO+KL": dppo_kl,
    "RefKL": lambda p: with_k2(RefKL(p["delta_low"]), reference.ref_kl(p["delta_low"]), 2 * p["kl_tau"]),
    "IPO": lambda p: Ours(IPO(p["delta"], p["max_ratio"]), reference.ipo(p["delta"], p["max_ratio"])),
    "IcePop": lambda p: Ours(IcePop(p["low"], p["high"]), reference.icepop(p["low"], p["high"])),
    "IcePop(detached)": lambda p: banded(p["low"], p["high"], "token"),
    "SeqMaskTIS(detached)": lambda p: banded(p["low"], p["high"], "geometric"),
    "PPOClip(prime)": ppo_prime,
    "CISPO(prime)": lambda p: Ours(
        CISPO(1 - p["ratio_low"], p["ratio_high"] - 1), reference.cispo(1 - p["ratio_low"], p["ratio_high"] - 1)
    ),
    "MaskedIS": masked_is,
    "OPSM": opsm,
    "OPSM(TRL)": opsm,
    "OPSM(decoupled)": opsm_decoupled,
    "DecoupledPPO": areal,
    "IcePop(decoupled)": lambda p: decoupled(clip_of(p), ("token", None, p["low"], p["high"])),
    "TIS(decoupled)": lambda p: decoupled(clip_of(p), ("token", p["high"], 0.0, None, False, p["low"])),
    "SequenceMaskIS": lambda p: decoupled(clip_of(p), ("sequence", None, 0.0, p["cap"])),
    "SeqMaskTIS(decoupled)": lambda p: decoupled(clip_of(p), ("token", UNCAPPED), (p["low"], p["high"], "geometric")),
    "KPop(detached)": lambda p: Ours(KPop(p["delta"]), reference.kpop(p["delta"])),
    "KPop(decoupled)": kpop_decoupled,
    "M2PO(AReaL, decoupled)": m2po_areal_decoupled,
    "VESPO(decoupled)": vespo_decoupled,
    "TOPR": topr,
    "DRPOEff": drpo_eff,
    "M2PO": m2po,
    "M2PO(AReaL)": lambda p: Ours(M2POAReaL(p["threshold"]), reference.m2po_areal(p["threshold"])),
    "VESPO": lambda p: Ours(VESPO(**p), reference.vespo(**p)),
    # Its factor n_i cancels the 1/n_i within s_i: GSPO, with every token weighing the same (horizon(1)).
    "LUSPO": lambda p: Ours(GSPO(p["low"], p["high"]), reference.gspo(p["low"], p["high"])),
}
"""The program's name -> its entry as ours, from its parameters."""
