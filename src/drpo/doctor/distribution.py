"""Checks of the distribution that is sampled: is the ratio 1 before anything is learnt, and if not, why."""

import math

import torch
from torch import Tensor

from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import RANKS, ProbeBatch
from drpo.model.routing import RoutingMismatch
from drpo.objectives import ImportanceSampling, Objective, gradient, out_of_region
from drpo.objectives import ratio as ratios
from drpo.train.divergence import ExactDivergence
from drpo.train.metrics import token_metrics
from drpo.types import TokenStats

K3_NOTE, K3_BROKEN = 0.02, 0.1
"""Nats per token of KL(mu || pi) at which mismatch is worth a note, and from which training is not to be trusted."""

OUT_OF_REGION_NOTE, OUT_OF_REGION_BROKEN = 0.01, 0.1
"""Share of tokens outside the region before anything is learnt."""

ROUTED_NOTE = 0.1
"""Share of tokens and layers of a mixture of experts that are routed otherwise."""

SURE = 20.0
"""A distribution is called truncated where an untruncated one would give these tokens with a chance below e^-20."""

SIGMAS = 6.0
"""How far from its expectation a mean may be by chance."""


def ratio(batch: ProbeBatch, objective: Objective) -> Finding:
    """The lr = 0 test: the same weights on both sides, so pi / mu is 1 but for rounding."""
    plain = ImportanceSampling()
    found = token_metrics(plain, TokenStats(batch.tokens, batch.entropy, gradient(plain, batch.tokens), {}))
    values = {name: found[name] for name in ("ratio_mean", "k3", "prob_diff_mean", "prob_diff_p99")}
    left = None if objective.needs else out_of_region(objective, batch.tokens)  # no top-K divergence was asked for
    outside = 0.0 if left is None else float(left.double().mean())
    values |= {} if left is None else {"out_of_region": outside}
    values["tokens"] = len(batch)
    error = SIGMAS * float(ratios(batch.tokens).double().std()) / math.sqrt(len(batch))
    right = abs(values["ratio_mean"] - 1) <= 0.02 + error and values["k3"] <= K3_BROKEN
    right = right and outside <= OUT_OF_REGION_BROKEN
    verdict, advice = judge(right, "the sampler's log-probabilities are not the trainer's; the lines below say why")
    if right and (values["k3"] > K3_NOTE or outside > OUT_OF_REGION_NOTE):
        verdict, advice = (
            "note",
            "the region is partly spent on numerics: a finer --rollout-precision, or a larger delta",
        )
    return Finding(
        "ratio",
        verdict,
        f"mean pi/mu {values['ratio_mean']:.4f}, k3 {values['k3']:.4f}, |pi-mu| p99 {values['prob_diff_p99']:.3f}"
        + (f", {outside:.2%} outside the region" if left is not None else ""),
        f"1 +- 0.02, {K3_BROKEN:g}, {OUT_OF_REGION_BROKEN:.0%} outside, with the weights the same on both sides",
        advice,
        values,
    )


def divergence(found: ExactDivergence) -> Finding:
    """How far the two distributions are apart over the whole vocabulary, not at the sampled tokens alone."""
    verdict, advice = judge(
        found.kl_mean <= K3_NOTE,
        "sampler and trainer differ much at equal weights: a finer --rollout-precision",
        "note",
    )
    return Finding(
        "divergence",
        verdict,
        f"over the whole vocabulary at {found.tokens} tokens: total variation {found.tv_mean:.4f} "
        f"(p99 {found.tv_p99:.3f}), KL {found.kl_mean:.5f} nats (p99 {found.kl_p99:.4f})",
        f"KL at most {K3_NOTE:g}",
        advice,
        vars(found),
    )


def routing(found: RoutingMismatch) -> Finding:
    """How often a mixture of experts sends a token elsewhere in the sampler than in the trainer."""
    verdict, advice = judge(
        found.share <= ROUTED_NOTE,
        "a finer --rollout-precision brings the sampler's choices nearer to the trainer's",
        "note",
    )
    apart = "" if found.gap_differing is None else f"; mean |pi-mu| {found.gap_differing:.4f} there"
    same = "" if found.gap_same is None else f", {found.gap_same:.4f} elsewhere"
    return Finding(
        "routing",
        verdict,
        f"{found.share:.2%} of {found.n_tokens} tokens x {found.n_layers} layers go to other experts in the sampler, "
        f"{found.share_of_tokens:.1%} of tokens in some layer{apart}{same}",
        f"{ROUTED_NOTE:.0%}",
        advice,
        {"share": found.share, "share_of_tokens": found.share_of_tokens},
    )


def alignment(batch: ProbeBatch) -> Finding:
    """Whether the reported log-probabilities belong to the tokens that they stand beside."""
    gaps = {shift: _gap(batch, shift) for shift in (-1, 0, 1)}
    best = min(gaps, key=lambda shift: gaps[shift])
    verdict, advice = judge(
        best == 0 or gaps[best] > gaps[0] / 2,
        f"the engine's log-probabilities are shifted by one token ({'left' if best > 0 else 'right'}): "
        "mend how the engine pairs them with its tokens",
    )
    return Finding(
        "alignment",
        verdict,
        f"mean |log mu - log p| {gaps[0]:.3f} as reported, {gaps[-1]:.2f} and {gaps[1]:.2f} shifted by one token",
        "smallest as reported",
        advice,
        {"gap": gaps[0], "gap_left": gaps[-1], "gap_right": gaps[1]},
    )


def _gap(batch: ProbeBatch, shift: int) -> float:
    """Mean |log mu - log p| with the engine's column moved by `shift` tokens within each completion."""
    lengths = [c.n_sampled for c in batch.completions]
    gaps = []
    for mu, p in zip(batch.behavior_logp.split(lengths), batch.plain.split(lengths), strict=True):
        a, b = (mu[shift:], p[: len(p) - shift]) if shift >= 0 else (mu[:shift], p[-shift:])
        gaps.append((a - b).abs())
    found = torch.cat(gaps)
    return float(found.mean()) if len(found) else math.inf


def temperature(batch: ProbeBatch) -> Finding:
    """Whether both sides' log-probabilities are those of the sampling temperature; it must not be 1."""
    t = batch.temperature
    sides = {
        "the engine's": (_mean_gap(batch.behavior_logp, batch.plain), _mean_gap(batch.behavior_logp, batch.raw)),
        "the trainer's": (_mean_gap(batch.logp, batch.plain), _mean_gap(batch.logp, batch.raw)),
    }
    wrong = [name for name, (right, raw) in sides.items() if raw < right / 2]
    verdict, advice = judge(
        not wrong,
        f"{' and '.join(wrong)} log-probabilities are those of temperature 1: the same one must scale mu and pi",
    )
    (a, a1), (b, b1) = sides.values()
    return Finding(
        "temperature",
        verdict,
        f"at {t:g}: mean |log mu - log p| {a:.3f} ({a1:.2f} from temperature 1), trainer {b:.3f} ({b1:.2f})",
        f"nearer to temperature {t:g} than to 1, on both sides",
        advice,
        {"engine": a, "engine_raw": a1, "trainer": b, "trainer_raw": b1},
    )


def _mean_gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().mean())


def draws(batch: ProbeBatch) -> Finding:
    """Whether the tokens are as surprising as the distribution says: -log p has the entropy as its mean."""
    surprise, entropy = float(-batch.plain.double().mean()), float(batch.entropy.double().mean())
    error = float(batch.spread.double().clamp(min=0).sum().sqrt()) / len(batch)
    z = (surprise - entropy) / max(error, 1e-9)
    fine = abs(z) <= SIGMAS or abs(surprise - entropy) <= 0.03 * entropy
    verdict, advice = judge(
        fine,
        f"the tokens are {'less' if z < 0 else 'more'} surprising than the distribution at "
        f"temperature {batch.temperature:g}: "
        + ("the sampler is colder or truncated (top-p, top-k, min-p)" if z < 0 else "the sampler is hotter")
        + "; send every sampling parameter explicitly",
    )
    return Finding(
        "draws",
        verdict,
        f"mean -log p of the sampled tokens {surprise:.3f}, entropy {entropy:.3f} at temperature {batch.temperature:g} "
        f"(z = {z:+.1f})",
        f"|z| <= {SIGMAS:g}",
        advice,
        {"surprise": surprise, "entropy": entropy, "z": z},
    )


def support(batch: ProbeBatch) -> Finding:
    """Whether unlikely tokens are drawn too: top-p and top-k cut them off, and a model's own settings may say so."""
    lowest = float(batch.tail.min())
    last = int(batch.rank.max()) + 1
    at = next((i for i, k in enumerate(RANKS) if k >= last), None)
    missed = 0.0 if at is None else float(batch.beyond[:, at].double().sum())
    signs = {"top_p": len(batch) * lowest, "top_k": missed}
    cut = max(signs, key=lambda name: signs[name])
    said = f"top-p {1 - lowest:.2f}" if cut == "top_p" else f"top-k {last}"
    verdict, advice = judge(
        signs[cut] <= SURE,
        f"the sampler is truncated, as by {said}: send top_p=1, top_k off and min_p=0 explicitly, whatever the model's "
        "generation_config.json says",
    )
    return Finding(
        "support",
        verdict,
        f"of {len(batch)} tokens the least probable leaves {lowest:.2%} of its distribution below it; the last rank "
        f"drawn is {last}, and {missed:.1f} tokens were to be expected beyond it",
        f"at most {SURE / len(batch):.2%} below, at most {SURE:g} beyond",
        advice,
        {"lowest": lowest, "last_rank": last, "missed": missed},
    )
