"""Checks of the sampling distribution: whether the ratio is 1 before training, and if not, why."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drpo.doctor.finding import Finding, judge
from drpo.doctor.probe_batch import RANKS, ProbeBatch
from drpo.model.routing import RoutingMismatch
from drpo.objectives import ImportanceSampling, Objective, gradient, out_of_region
from drpo.objectives import ratio as ratios
from drpo.train.divergence import ExactDivergence
from drpo.train.metrics import token_metrics
from drpo.types import Tokens, TokenStats

K3_NOTE, K3_BROKEN = 0.02, 0.1
"""Thresholds on KL(mu || pi), nats per token, for a note and for broken."""

OUT_OF_REGION_NOTE, OUT_OF_REGION_BROKEN = 0.01, 0.1
"""Thresholds on the share of tokens outside the region before training, for a note and for broken."""

ROUTED_NOTE = 0.1
"""Threshold on the share of (token, layer) pairs that a mixture of experts routes differently."""

SURE = 20.0
"""A distribution counts as truncated if an untruncated one gives these tokens with a probability below e^-20."""

SIGMAS = 6.0
"""Accepted distance of a mean from its expectation, in standard errors."""


def ratio(tokens: Tokens, entropy: Tensor, objective: Objective) -> Finding:
    """The lr = 0 test: with equal weights on both sides, pi / mu is 1 up to rounding.

    Args:
        tokens: T tokens, at least one.
        entropy: [T] nats.
        objective: the run's.
    """
    plain = ImportanceSampling()
    metrics = token_metrics(plain, TokenStats(tokens, entropy, gradient(plain, tokens), {}))
    values = {name: metrics[name] for name in ("ratio_mean", "k3", "prob_diff_mean", "prob_diff_p99")}
    left = None if objective.needs else out_of_region(objective, tokens)  # no top-K divergence in the batch
    outside = 0.0 if left is None else float(left.double().mean())
    values |= {} if left is None else {"out_of_region": outside}
    values["tokens"] = len(entropy)
    error = SIGMAS * float(ratios(tokens).double().std()) / math.sqrt(len(entropy))
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


def divergence(result: ExactDivergence) -> Finding:
    """Distance of the two distributions over the whole vocabulary, not only at the sampled tokens."""
    verdict, advice = judge(
        result.kl_mean <= K3_NOTE,
        "sampler and trainer differ much at equal weights: a finer --rollout-precision",
        "note",
    )
    return Finding(
        "divergence",
        verdict,
        f"over the whole vocabulary at {result.tokens} tokens: total variation {result.tv_mean:.4f} "
        f"(p99 {result.tv_p99:.3f}), KL {result.kl_mean:.5f} nats (p99 {result.kl_p99:.4f})",
        f"KL at most {K3_NOTE:g}",
        advice,
        vars(result),
    )


def routing(mismatch: RoutingMismatch) -> Finding:
    """How often a mixture of experts routes a token differently in the sampler and the trainer."""
    verdict, advice = judge(
        mismatch.share <= ROUTED_NOTE,
        "--routing-replay sampler trains with the sampler's choices; a finer --rollout-precision brings them nearer",
        "note",
    )
    apart = "" if mismatch.gap_differing is None else f"; mean |pi-mu| {mismatch.gap_differing:.4f} there"
    same = "" if mismatch.gap_same is None else f", {mismatch.gap_same:.4f} elsewhere"
    return Finding(
        "routing",
        verdict,
        f"{mismatch.share:.2%} of {mismatch.n_tokens} tokens x {mismatch.n_layers} layers go to other experts in the "
        f"sampler, {mismatch.share_of_tokens:.1%} of tokens in some layer{apart}{same}",
        f"{ROUTED_NOTE:.0%}",
        advice,
        {"share": mismatch.share, "share_of_tokens": mismatch.share_of_tokens},
    )


def alignment(lengths: Sequence[int], behavior_logp: Tensor, logp: Tensor) -> Finding:
    """Whether the reported log-probabilities belong to their tokens, and are not shifted.

    Args:
        lengths: tokens of each completion, T in all.
        behavior_logp: [T] as the engine reported them.
        logp: [T] as the model computes them.
    """
    gaps = {shift: _gap(lengths, behavior_logp, logp, shift) for shift in (-1, 0, 1)}
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


def _gap(lengths: Sequence[int], behavior_logp: Tensor, logp: Tensor, shift: int) -> float:
    """Mean |log mu - log p| with the engine's column moved by `shift` tokens within each completion."""
    gaps = []
    for mu, p in zip(behavior_logp.split(list(lengths)), logp.split(list(lengths)), strict=True):
        a, b = (mu[shift:], p[: len(p) - shift]) if shift >= 0 else (mu[:shift], p[-shift:])
        gaps.append((a - b).abs())
    gap = torch.cat(gaps)
    return float(gap.mean()) if len(gap) else math.inf


def temperature(batch: ProbeBatch) -> Finding:
    """Whether both sides' log-probabilities are at the sampling temperature, which must not be 1."""
    t = batch.temperature
    sides = {
        "the engine's": (_mean_gap(batch.behavior_logp, batch.plain), _mean_gap(batch.behavior_logp, batch.raw)),
        "the trainer's": (_mean_gap(batch.logp, batch.plain), _mean_gap(batch.logp, batch.raw)),
    }
    wrong = [name for name, (right, raw) in sides.items() if raw < right / 2]
    verdict, advice = judge(
        not wrong,
        f"{' and '.join(wrong)} log-probabilities are those of temperature 1: the sampling temperature "
        "must scale both mu and pi",
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
    """Whether the mean of -log p of the sampled tokens equals the entropy of the distribution."""
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
    """Whether unlikely tokens are sampled: top-p, top-k or a model's generation settings may exclude them."""
    lowest = float(batch.tail.min())
    last = int(batch.rank.max()) + 1
    at = next((i for i, k in enumerate(RANKS) if k >= last), None)
    missed = 0.0 if at is None else float(batch.beyond[:, at].double().sum())
    signs = {"top_p": len(batch) * lowest, "top_k": missed}
    cut = max(signs, key=lambda name: signs[name])
    truncation = f"top-p {1 - lowest:.2f}" if cut == "top_p" else f"top-k {last}"
    verdict, advice = judge(
        signs[cut] <= SURE,
        f"the sampler is truncated, as by {truncation}: send top_p=1, top_k off and min_p=0 explicitly, to override "
        "the model's generation_config.json",
    )
    return Finding(
        "support",
        verdict,
        f"of {len(batch)} tokens the least likely has {lowest:.2%} of its distribution below it; the highest rank "
        f"sampled is {last}, and {missed:.1f} tokens were expected beyond it",
        f"at most {SURE / len(batch):.2%} below, at most {SURE:g} beyond",
        advice,
        {"lowest": lowest, "last_rank": last, "missed": missed},
    )
