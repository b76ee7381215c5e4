"""Every objective against its printed formula, and against what all of them must have in common.

A new objective is tested by adding one row to `CASES`. Errors are relative to `Truth.scale`, the size of the terms that
the formula adds up. A token nearer than `EDGE` to a jump of the gradient (a clip, a mask) is not compared: there
the side is a matter of rounding.
"""

import copy
import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from drpo import reductions
from drpo.errors import InputError
from drpo.objectives import (
    CISPO,
    CPPO,
    DPPO,
    DRPO,
    GMPO,
    GSPO,
    IPO,
    K2,
    M2PO,
    OPSM,
    REGISTRY,
    SAPO,
    SPO,
    TOPR,
    VESPO,
    Band,
    BinaryKL,
    ClipCov,
    Decoupled,
    DivergencePenalty,
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
    gradient,
    gradient_weight,
    of_batch,
    total,
    vanishes_at_zero_advantage,
)
from drpo.objectives.composed import Proximal, summands
from drpo.objectives.factors import RATIOS, STATISTICS
from drpo.objectives.mask import bernoulli_kl
from drpo.objectives.ratios import prob_diff, ratio
from drpo.objectives.sequences import Sequences
from drpo.objectives.whole_batch import Covariance, Dropping
from drpo.spec import Summand, format_spec, parse_spec
from drpo.types import TokenLoss, Tokens
from support import golden_2026, reference
from support.reference import Rule, Truth, truths

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
EDGE = {torch.float64: 1e-9, torch.float32: 1e-4}
UNDERFLOW = {torch.float64: 1e-300, torch.float32: 1e-35, torch.bfloat16: 1e-35}


class Case(NamedTuple):
    """One objective: its spec, itself, its printed formula, and whether the loss has that gradient as a function.

    `smooth` is False where the formula stops the gradient, so that the loss's slope is something else.
    """

    spec: str
    objective: Objective
    rule: Rule
    smooth: bool = True


CASES = [
    Case("none", ImportanceSampling(), reference.importance_sampling()),
    Case("tis(2)", ImportanceSampling(2.0), reference.importance_sampling(2.0), smooth=False),
    Case("ppo(0.2,0.28)", PPOClip(0.2, 0.28), reference.ppo_clip(0.2, 0.28)),
    Case("ppo(0.2,0.2,dual=3)", PPOClip(0.2, 0.2, 3.0), reference.ppo_clip(0.2, 0.2, 3.0)),
    Case("spo(0.3)", SPO(0.3), reference.spo(0.3)),
    Case("dppo(0.15)", DPPO(0.15), reference.dppo(0.15), smooth=False),
    Case("dppo(0.1,0.2)", DPPO(0.1, 0.2), reference.dppo(0.1, 0.2), smooth=False),
    Case(
        "dppo(0.03,0.06,divergence='kl')",
        DPPO(0.03, 0.06, divergence="kl"),
        reference.dppo(0.03, 0.06, "kl"),
        smooth=False,
    ),
    Case("dppo(0.15,max_ratio=1.5)", DPPO(0.15, max_ratio=1.5), reference.dppo(0.15, None, "tv", 1.5), smooth=False),
    Case("dppo(0.15,divergence='topk_tv')", DPPO(0.15, None, "topk_tv"), reference.dppo(0.15, None, "topk"), False),
    Case("dppo(0.03,0.06,'topk_kl')", DPPO(0.03, 0.06, "topk_kl"), reference.dppo(0.03, 0.06, "topk"), smooth=False),
    Case("drpo", DRPO(), reference.drpo(12.5)),
    Case("drpo(0.2)", DRPO(0.2), reference.drpo(0.2)),
    Case("drpo(0.2,power=0.5)", DRPO(0.2, power=0.5), reference.drpo(0.2, power=0.5)),
    Case("drpo(3,power=1)", DRPO(3.0, power=1.0), reference.drpo(3.0, power=1)),
    Case("drpo(0.1,outside=0.15)", DRPO(0.1, outside=0.15), reference.drpo(0.1, outside=0.15)),
    Case(
        "drpo(0.2,advantage_weighted=False)",
        DRPO(0.2, advantage_weighted=False),
        reference.drpo(0.2, advantage_weighted=False),
    ),
    Case("cispo(0.2,0.28)", CISPO(0.2, 0.28), reference.cispo(0.2, 0.28), smooth=False),
    Case("gspo(0.3,0.4)", GSPO(0.3, 0.4), reference.gspo(0.3, 0.4)),
    Case("sapo(1,1.05)", SAPO(1.0, 1.05), reference.sapo(1.0, 1.05)),
    Case("mask(0.1)", SymmetricMask(0.1), reference.symmetric_mask(0.1)),
    Case("mask(0.05,divergence='kl')", SymmetricMask(0.05, "kl"), reference.symmetric_mask(0.05, "kl")),
    Case("penalty('tv',0.5)", DivergencePenalty("tv", 0.5), reference.divergence_penalty("tv", 0.5)),
    Case("penalty('k1',0.5)", DivergencePenalty("k1", 0.5), reference.divergence_penalty("k1", 0.5)),
    Case("penalty('k3',0.5)", DivergencePenalty("k3", 0.5), reference.divergence_penalty("k3", 0.5)),
    Case("reinforce", Reinforce(), reference.reinforce(), smooth=False),
    Case("k2", K2(), reference.k2()),
    Case("ref_kl(0.1)", RefKL(0.1), reference.ref_kl(0.1), smooth=False),
    Case("ipo(0.1,1.2)", IPO(0.1, 1.2), reference.ipo(0.1, 1.2), smooth=False),
    Case("icepop(0.5,2)", IcePop(0.5, 2.0), reference.icepop(0.5, 2.0)),
    Case("kpop(0.05)", KPop(0.05), reference.kpop(0.05)),
    Case("cppo(0.1,0.5,0.01)", CPPO(0.1, 0.5, 0.01), reference.cppo(0.1, 0.5, 0.01)),
    Case("cppo(0.2,horizon=12)", CPPO(0.2, horizon=12), reference.cppo(0.2, 0.8, 0.02, 12)),
    Case("cppo(max_ratio=1.3)", CPPO(max_ratio=1.3), reference.cppo(0.2, 0.8, 0.02, None, 1.3), smooth=False),
    Case("vespo", VESPO(), reference.vespo(), smooth=False),
    Case("gmpo(0.3,0.2)", GMPO(0.3, 0.2), reference.gmpo(0.3, 0.2)),
    Case("m2po(0.1)", M2PO(0.1), reference.m2po(0.1), smooth=False),
    Case("m2po(0.05,0.2,0.3)", M2PO(0.05, 0.2, 0.3), reference.m2po(0.05, 0.2, 0.3), smooth=False),
    Case("m2po_areal(0.1)", M2POAReaL(0.1), reference.m2po_areal(0.1)),
    Case("clip_cov(0.2,0.28,1,0.3,5)", ClipCov(0.2, 0.28, 1.0, 0.3, 5.0), reference.clip_cov(0.2, 0.28, 0.3, 5.0)),
    Case("kl_cov(0.2,0.5)", KLCov(0.2, 0.5), reference.kl_cov(0.2, 0.5)),
    Case(
        "mask(0.2) + 0.1*k2",
        Sum(((1.0, SymmetricMask(0.2)), (0.1, K2()))),
        reference.added((1.0, reference.symmetric_mask(0.2)), (0.1, reference.k2())),
    ),
    Case("0.5*drpo(0.2)", Sum(((0.5, DRPO(0.2)),)), reference.added((0.5, reference.drpo(0.2)))),
    *(
        Case(
            f"none*band({low},{high},'{over}')",
            Product(ImportanceSampling(), (Band(low, high, over),)),
            reference.product(reference.importance_sampling(), reference.band(low, high, over)),
        )
        for low, high, over in (
            (0.5, 1.5, "token"),
            (0.4, 2.0, "sequence"),
            (0.8, 1.3, "geometric"),
            (0.2, 3.0, "every"),
        )
    ),
    *(
        Case(
            f"drpo(0.2)*reject('{statistic}',{high},{low})",
            Product(DRPO(0.2), (Reject(statistic, high, low),)),
            reference.product(reference.drpo(0.2), reference.reject(statistic, high, low)),
        )
        for statistic, high, low in (
            ("token_k1", 1.5, 0.6),
            ("token_k2", 0.1, 0.0),
            ("token_k3", 0.05, 0.0),
            ("seq_sum_k1", 2.0, 0.5),
            ("seq_sum_k2", 1.0, 0.0),
            ("seq_sum_k3", 0.8, 0.0),
            ("seq_mean_k1", 4.0, 0.9),
            ("seq_mean_k2", 0.2, 0.0),
            ("seq_mean_k3", 0.2, 0.0),
            ("seq_max_k1", 2.5, 0.0),
            ("seq_max_k2", 0.5, 0.0),
            ("seq_max_k3", 0.4, 0.0),
        )
    ),
    Case(
        "ppo(0.2,0.2,3)*opsm(0.1)*band(0.3,3)",
        Product(PPOClip(0.2, 0.2, 3.0), (OPSM(0.1), Band(0.3, 3.0))),
        reference.product(reference.ppo_clip(0.2, 0.2, 3.0), reference.opsm(0.1), reference.band(0.3, 3.0)),
    ),
    *(
        Case(
            f"reinforce*weight({', '.join(map(repr, given))})",
            Product(Reinforce(), (ImportanceWeight(*given),)),
            reference.product(reference.reinforce(), reference.weight(*given)),
            smooth=False,
        )
        for given in (
            ("token", 2.0, 0.0, None, False),
            ("sequence", 2.0, 0.0, None, False),
            ("geometric", 1.5, 0.7, 3.0, False),
            ("token", None, 0.1, 2.0, False),
            ("token", 2.0, 0.0, None, True),
            ("sequence", 2.0, 0.0, None, True),
            ("token", 1e9, 0.2, 1e9, False, 0.5),
        )
    ),
]
CASES += [
    Case(
        "ppo(0.2,0.28)*proximal*weight('token',high=5.0,low=0.5)",
        Decoupled(PPOClip(0.2, 0.28), (ImportanceWeight("token", low=0.5, high=5.0),)),
        reference.decoupled(reference.ppo_clip(0.2, 0.28), reference.weight("token", low=0.5, high=5.0)),
    ),
    Case(
        "none*opsm(0.1)*proximal*band(0.7,1.4,'geometric')",
        Decoupled(Product(ImportanceSampling(), (OPSM(0.1),)), (Band(0.7, 1.4, "geometric"),)),
        reference.decoupled(
            reference.product(reference.importance_sampling(), reference.opsm(0.1)),
            reference.band(0.7, 1.4, "geometric"),
        ),
    ),
    Case("drpo(0.2)*proximal", Decoupled(DRPO(0.2)), reference.decoupled(reference.drpo(0.2))),
    Case(
        "ppo(0.2,0.28)*proximal*weight('token',5.0)*binary_kl(0.05)",
        Decoupled(PPOClip(0.2, 0.28), (ImportanceWeight("token", 5.0), BinaryKL(0.05))),
        reference.decoupled(reference.ppo_clip(0.2, 0.28), reference.weight("token", 5.0), reference.both_ways(0.05)),
    ),
    Case(
        "ppo(0.2,0.28)*proximal*second_moment(0.03)",
        Decoupled(PPOClip(0.2, 0.28), (SecondMoment(0.03),)),
        reference.decoupled(reference.ppo_clip(0.2, 0.28), reference.second_moment(0.03)),
    ),
    Case("vespo(max_ratio=1.2)", VESPO(max_ratio=1.2), reference.vespo(max_ratio=1.2), smooth=False),
    Case("ppo(0.2,0.28,max_ratio=1.3)", PPOClip(0.2, 0.28, None, 1.3), reference.ppo_clip(0.2, 0.28, None, 1.3), False),
    Case("topr", TOPR(), reference.topr(), smooth=False),
    Case("topr(1,1,'sequence')", TOPR(1.0, 1.0, "sequence"), reference.topr(1, 1, "sequence"), smooth=False),
    Case("drpo_eff(0.2)", DRPOEff(0.2), reference.drpo_eff(0.2), smooth=False),
    *(
        Case(
            f"drpo_eff(0.2,map={map!r},metric={metric!r},low=0.25,high=2.5,beta=0.7,metric_clip={most})",
            DRPOEff(0.2, map, metric, 0.25, 2.5, beta=0.7, metric_clip=most),
            reference.drpo_eff(0.2, map, metric, 0.25, 2.5, beta=0.7, metric_clip=most),
            smooth=False,
        )
        for map, metric, most in (
            ("log_tanh", "log_ratio", None),
            ("power", "log_ratio", None),
            ("residual_sech", "log_ratio", None),
            ("sigmoid_bound", "prob_diff", None),
            ("tanh_bound", "fisher", 0.5),
        )
    ),
]
MOVES_AT_ZERO_ADVANTAGE = (
    *(DRPO(0.2, advantage_weighted=False), K2(), KLCov(0.2, 0.5), RefKL(0.1)),
    Sum(((1.0, SymmetricMask(0.2)), (0.1, K2()))),
)
"""The objectives whose documented gradient at A = 0 is not 0."""

each_case = pytest.mark.parametrize("case", CASES, ids=[c.spec for c in CASES])
each_objective = pytest.mark.parametrize("objective", [c.objective for c in CASES], ids=[c.spec for c in CASES])
REDUCTIONS = ["token_mean", "sequence_mean", "horizon(9)"]
WEIGHED = [(c, "token_mean") for c in CASES] + [(c, r) for c in CASES if c.spec == "drpo(0.2)" for r in REDUCTIONS[1:]]
each_weighing = pytest.mark.parametrize(
    ("objective", "reduction"), [(c.objective, r) for c, r in WEIGHED], ids=[f"{r}-{c.spec}" for c, r in WEIGHED]
)
"""Every objective, and every reduction: weights are numbers that do not depend on the objective."""
each_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
half_as_often = settings(max_examples=settings.default.max_examples // 2)
"""For tests of every objective whose truth has 50 digits: each draws a batch of many tokens, so few draws see much."""


# ------------------------------------------------------------------------------------------------------------ tokens


def stretch(logp: Tensor, behavior_logp: Tensor) -> Tensor:
    """A column in place of a top-K divergence, `reference.Token.divergence`."""
    wide = torch.promote_types(logp.dtype, torch.float32)
    return ((logp.to(wide) - behavior_logp.to(wide)).abs() / 4).clamp(max=1)


def between(logp: Tensor, behavior_logp: Tensor) -> Tensor:
    """A column in place of a proximal policy's log-probabilities."""
    wide = torch.promote_types(logp.dtype, torch.float32)
    return (logp.to(wide) + behavior_logp.to(wide)) / 2


def taught(logp: Tensor, behavior_logp: Tensor) -> Tensor:
    """A column in place of a reference model's log-probabilities: on either side of the policy's."""
    wide = torch.promote_types(logp.dtype, torch.float32)
    return 0.5 * behavior_logp.to(wide) + 0.4 * logp.to(wide)


def rewarded(advantage: Tensor) -> Tensor:
    """A column in place of the episodes' rewards: some are successes below their group's mean."""
    return advantage + 0.5


def make_tokens(
    logp: list[float],
    behavior_logp: list[float],
    advantage: list[float],
    keep: list[bool] | None = None,
    sequence: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tokens:
    """Tokens of plain numbers; all kept and each a sequence of its own unless said."""
    n = len(logp)
    pi, mu, a = (torch.tensor(column, dtype=dtype) for column in (logp, behavior_logp, advantage))
    return Tokens(
        pi,
        mu,
        a,
        torch.tensor([True] * n if keep is None else keep),
        torch.tensor(list(range(n)) if sequence is None else sequence),
        stretch(pi, mu),
        proximal_logp=between(pi, mu),
        score=rewarded(a),
        reference_logp=taught(pi, mu),
    )


def probable(pi: float, mu: float, advantage: float) -> Tokens:
    """One token of these probabilities."""
    return make_tokens([math.log(pi)], [math.log(mu)], [advantage])


def take(tokens: Tokens, index: Tensor) -> Tokens:
    """Some of the tokens, in the order of `index`."""
    rows = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    return Tokens(**{name: value if value is None else value[index] for name, value in rows.items()})


def in_order(tokens: Tokens) -> Tokens:
    """The tokens with their positions, so that they may be shuffled."""
    return dataclasses.replace(tokens, position=torch.arange(len(tokens.logp)))


def random_tokens(lengths: list[int], seed: int = 0, spread: float = 0.7, masked: float = 0.25) -> Tokens:
    """Sequences of these lengths in float64, some tokens masked, at least one of each sequence kept."""
    make = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    behavior_logp = -torch.rand(n, generator=make, dtype=torch.float64) * 4 - 0.05
    step = torch.randn(n, generator=make, dtype=torch.float64) * spread
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    keep = torch.rand(n, generator=make) >= masked
    keep[torch.tensor(lengths).cumsum(0) - 1] = True
    logp = (behavior_logp + step).clamp(max=-1e-3)
    advantage = torch.randn(len(lengths), generator=make, dtype=torch.float64)[sequence]
    return Tokens(
        logp,
        behavior_logp,
        advantage,
        keep,
        sequence,
        stretch(logp, behavior_logp),
        proximal_logp=between(logp, behavior_logp),
        score=rewarded(advantage),
        reference_logp=taught(logp, behavior_logp),
    )


def of(case: Case, tokens: Tokens) -> list[Truth | None]:
    """What is true of every token, None where masked."""
    columns = (tokens.logp, tokens.behavior_logp, tokens.advantage, tokens.keep, tokens.sequence)
    more = (tokens.proximal_logp, tokens.score, tokens.reference_logp)
    return truths(case.rule, *(None if c is None else c.tolist() for c in (*columns, *more)))


def check(got: Tensor, want: list[float], scale: list[float], truth: list[Truth], dtype: torch.dtype) -> None:
    """Require |got - want| <= tolerance * scale, or underflow, of every token that is not at an edge."""
    for i, t in enumerate(truth):
        if t.margin > EDGE[dtype]:
            value, allowed = got[i].item(), TOLERANCE[dtype] * scale[i] + UNDERFLOW[dtype]
            assert abs(value - want[i]) <= allowed, f"token {i}: {value!r}, not {want[i]!r}; {t}"


def check_gradient_and_weight(case: Case, tokens: Tokens, truth: list[Truth]) -> tuple[Tensor, Tensor]:
    """Require the gradient and the gradient weight of every kept token, in the tokens' own precision; return both."""
    dtype, kept = tokens.logp.dtype, tokens.keep
    slope, weight = gradient(case.objective, tokens), gradient_weight(case.objective, tokens)
    check(slope[kept], [t.gradient for t in truth], [t.scale for t in truth], truth, dtype)
    check(weight[kept], [t.weight for t in truth], [t.weight_scale for t in truth], truth, dtype)
    return slope, weight


def draw_probabilities(make: random.Random) -> tuple[float, float]:
    """log pi and log mu of one token, from one of the places where something happens."""
    mu, anywhere = make.uniform(0.01, 0.99), (-14 * make.random(), -14 * make.random())
    tiny = -(2.0 ** -make.randint(5, 20))
    return make.choice(
        [
            (math.log(min(max(mu + make.uniform(-0.3, 0.3), 0.003), 1.0)), math.log(mu)),  # about the edge of a region
            (min(math.log(mu) + make.uniform(-0.5, 0.5), 0.0), math.log(mu)),  # about a clip
            (min(math.log(mu) + make.gauss(0, 0.01), 0.0), math.log(mu)),  # nearly on-policy
            (math.log(mu), math.log(mu)),  # on-policy
            (min(anywhere[1] + make.uniform(0, 5), 0.0), anywhere[1]),  # much likelier than it was
            anywhere,
            (tiny, anywhere[1]),  # pi, or mu, or both nearly or quite 1
            (anywhere[0], tiny * make.randint(0, 1)),
            (tiny * make.randint(0, 1), -(2.0 ** -make.randint(5, 20))),
        ]
    )


@st.composite
def batches(draw: st.DrawFn) -> Tokens:
    """24 tokens of three interleaved, partly masked sequences in float64; float32 holds every number exactly.

    Only the seed is hypothesis's: failures name the token, so there is nothing to gain from shrinking a batch.
    """
    make = random.Random(draw(st.integers(0, 2**32)))
    rows = [
        (
            *draw_probabilities(make),
            make.choice([0.0, *(sign * make.uniform(0.05, 3) for sign in (1, -1, 1, -1, 1, -1))]),
            make.random() < 0.8,
            make.randint(0, 2),
        )
        for _ in range(24)
    ]
    tokens = make_tokens(*(list(column) for column in zip(*rows, strict=True)))
    return cast(cast(tokens, torch.float32), torch.float64)


def cast(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    """The same tokens, their floating tensors in `dtype`."""
    logp, behavior_logp, advantage = (x.to(dtype) for x in (tokens.logp, tokens.behavior_logp, tokens.advantage))
    return Tokens(
        logp,
        behavior_logp,
        advantage,
        tokens.keep,
        tokens.sequence,
        stretch(logp, behavior_logp),
        proximal_logp=between(logp, behavior_logp),
        score=rewarded(advantage),
        reference_logp=taught(logp, behavior_logp),
    )


# ------------------------------------------------------------------------------------------- the value and its slope


@each_case
@half_as_often
@given(tokens=batches())
def test_loss_gradient_and_weight_are_the_printed_formula(case: Case, tokens: Tokens) -> None:
    """In float64 and float32: what a batch holds is the same number in both, so both have one truth."""
    kept, truth = tokens.keep, [t for t in of(case, tokens) if t]
    for dtype in TOLERANCE:
        slope, weight = check_gradient_and_weight(case, cast(tokens, dtype), truth)
        assert slope.dtype == dtype
        assert (slope[~kept] == 0).all()
        assert (weight[~kept | (tokens.advantage == 0)] == 1).all()
    loss = case.objective(take(tokens, kept.nonzero()[:, 0])).loss
    assert loss.shape == (int(kept.sum()),)
    check(loss, [t.loss for t in truth], [t.scale + abs(t.loss) for t in truth], truth, torch.float64)


@pytest.mark.parametrize("case", [c for c in CASES if c.smooth], ids=lambda c: c.spec)
def test_gradient_is_the_finite_difference_of_the_loss(case: Case) -> None:
    """The loss's value and its slope are written separately; this holds them together."""
    tokens, step = random_tokens([3, 5, 1, 4], seed=1), 1e-6
    weight = torch.ones_like(tokens.logp)
    slope = gradient(case.objective, tokens)
    for i, truth in enumerate(of(case, tokens)):
        if truth is None:
            continue
        assert truth.margin > 1e-4, "the batch must keep clear of every jump"
        bump = torch.zeros_like(tokens.logp)
        bump[i] = step
        up, down = (
            total(case.objective, dataclasses.replace(tokens, logp=tokens.logp + sign * bump), weight)
            for sign in (1, -1)
        )
        assert ((up - down) / (2 * step)).item() == pytest.approx(slope[i].item(), rel=1e-6, abs=1e-7 * truth.scale)


@each_objective
def test_on_policy_is_reinforce(objective: Objective) -> None:
    """Where pi = mu every method is REINFORCE, but for the k1 penalty, whose pull does not vanish there, a penalty
    alone, half a loss, what drops tokens by their covariance, and what follows a reference model.
    """
    tokens = random_tokens([2, 3, 4], spread=0.0)
    want = -tokens.advantage
    if isinstance(objective, ClipCov):
        objective = dataclasses.replace(objective, cov_low=1e3, cov_high=1e4)
    if objective == K2():
        want = torch.zeros_like(want)
    if isinstance(objective, Sum) and len(objective.terms) == 1:
        want = 0.5 * want
    if objective == RefKL(0.1):
        want = tokens.logp - taught(tokens.logp, tokens.behavior_logp)
    if objective == DivergencePenalty("k1", 0.5):
        want = want - 0.5 * tokens.advantage.abs()
    assert torch.equal(gradient(objective, tokens), torch.where(tokens.keep, want, 0))


GRID = torch.linspace(-30.0, 0.0, 31, dtype=torch.float64)


@each_objective
def test_zero_advantage_has_exactly_zero_gradient(objective: Objective) -> None:
    logp, behavior_logp = (g.reshape(-1) for g in torch.meshgrid(GRID, GRID, indexing="ij"))
    n = len(logp)
    moved, middle = stretch(logp, behavior_logp), between(logp, behavior_logp)
    columns = (torch.zeros(n).double(), torch.ones(n).bool(), torch.arange(n), moved)
    tokens = Tokens(logp, behavior_logp, *columns, None, middle, logp.sin(), taught(logp, behavior_logp))
    slope = gradient(objective, tokens)
    still = objective not in MOVES_AT_ZERO_ADVANTAGE
    assert bool((slope == 0).all()) == vanishes_at_zero_advantage(objective) == still
    assert torch.isfinite(slope).all()
    assert (gradient_weight(objective, tokens) == 1).all()


# -------------------------------------------------------------------------------------------------- shape of the region

QUADRANTS = [(1.0, 0.55), (1.0, 0.25), (-1.0, 0.55), (-1.0, 0.25)]  # sign(A) and pi, around mu = 0.4: D = 0.15, -0.15
RATIO_SHIFT = 0.375  # r - 1


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (DRPO(0.2), (0.25, 1.75, 1.75, 0.25)),
        (DRPO(0.1), (-0.5, 2.5, 2.5, -0.5)),
        (DRPO(12.5), (0.988, 1.012, 1.012, 0.988)),
        (DRPO(0.5, power=1.0), (0.25, 1.75, 1.75, 0.25)),
        (DRPO(0.3 / math.sqrt(0.4), power=0.5), (0.5, 1.5, 1.5, 0.5)),
        (DRPO(0.1, outside=0.2), (1.0, 1.0, 1.0, 1.0)),
        (DRPO(0.1, outside=0.14), (-0.5, 2.5, 2.5, -0.5)),
        (SPO(0.5), (0.25, 1.75, 1.75, 0.25)),
        (PPOClip(0.2, 0.2), (0.0, 1.0, 1.0, 0.0)),
        (PPOClip(0.2, 0.5), (1.0, 1.0, 1.0, 0.0)),
        (PPOClip(0.5, 0.2), (0.0, 1.0, 1.0, 1.0)),
        (PPOClip(0.2, 0.5, dual=1.25), (1.0, 1.0, 0.0, 0.0)),
        (GSPO(0.2, 0.5), (1.0, 1.0, 1.0, 0.0)),
        (DPPO(0.1), (0.0, 1.0, 1.0, 0.0)),
        (DPPO(0.1, 0.2), (1.0, 1.0, 1.0, 0.0)),
        (DPPO(0.2, 0.1), (0.0, 1.0, 1.0, 1.0)),
        (DPPO(0.02, 0.06, divergence="kl"), (1.0, 1.0, 1.0, 0.0)),
        (DPPO(0.06, 0.02, divergence="kl"), (0.0, 1.0, 1.0, 1.0)),
        (DPPO(0.1, divergence="topk_tv"), (1.0, 1.0, 1.0, 0.0)),
        (DPPO(0.1, 0.05, divergence="topk_kl"), (0.0, 1.0, 1.0, 0.0)),
        (DPPO(0.2, max_ratio=1.1), (1.1 / 1.375, 1.0, 1.1 / 1.375, 1.0)),
        (SymmetricMask(0.1), (0.0, 0.0, 0.0, 0.0)),
        (SymmetricMask(0.2), (1.0, 1.0, 1.0, 1.0)),
        (SymmetricMask(0.05, "kl"), (1.0, 0.0, 1.0, 0.0)),
        (CISPO(0.2, 0.28), (1.28 / 1.375, 0.8 / 0.625, 1.28 / 1.375, 0.8 / 0.625)),
        (ImportanceSampling(1.1), (1.1 / 1.375, 1.0, 1.1 / 1.375, 1.0)),
        (DivergencePenalty("tv", 0.5), (0.75, 1.25, 1.25, 0.75)),
        (DivergencePenalty("k3", 0.5), (1 - 0.1875 / 1.375, 1.3, 1 + 0.1875 / 1.375, 0.7)),
        (DivergencePenalty("k1", 0.5), (1 + 0.5 / 1.375, 1 + 0.5 / 0.625, 1 - 0.5 / 1.375, 1 - 0.5 / 0.625)),
    ],
    ids=str,
)
def test_weight_in_each_quadrant_of_advantage_and_ratio(objective: Objective, weights: tuple[float, ...]) -> None:
    """By hand at mu = 0.4: KL is 0.0459 at pi = 0.55 and 0.0541 at pi = 0.25, `stretch` 0.0796 and 0.1175."""
    got = [gradient_weight(objective, probable(pi, 0.4, a)).item() for a, pi in QUADRANTS]
    assert got == pytest.approx(weights, rel=1e-12, abs=1e-12)


@given(
    mu=st.floats(1e-6, 1.0 - 1e-6),
    delta=st.floats(1e-3, 1.0),
    power=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    up=st.booleans(),
)
def test_drpo_weight_is_zero_on_the_boundary_and_turns_round_beyond(
    mu: float, delta: float, power: float, up: bool
) -> None:
    sign = 1 if up else -1
    pi, beyond = (mu + sign * delta * mu**power * x for x in (1, 1.001))
    assume(0 < beyond < 1)
    objective = DRPO(delta, power=power)
    assert gradient_weight(objective, probable(pi, mu, sign)).item() == pytest.approx(0, abs=1e-9)
    assert gradient_weight(objective, probable(beyond, mu, sign)).item() < 0
    assert gradient_weight(objective, probable(beyond, mu, -sign)).item() > 1


@given(tokens=batches(), delta=st.floats(0.05, 20.0))
def test_drpo_weight_is_bounded(tokens: Tokens, delta: float) -> None:
    weight = gradient_weight(DRPO(delta), tokens)
    assert ((weight - 1).abs() <= 1 / delta + 1e-12).all()


@given(tokens=batches(), delta=st.floats(0.05, 0.95))
def test_drpo_pulls_back_exactly_what_dppo_drops(tokens: Tokens, delta: float) -> None:
    moved = (tokens.logp.exp() - tokens.behavior_logp.exp()).abs()
    assume(((moved - delta).abs() > 1e-9).all())
    pulled_back, kept = gradient_weight(DRPO(delta), tokens) < 0, gradient(DPPO(delta), tokens) != 0
    counted = tokens.keep & (tokens.advantage != 0)
    assert torch.equal(pulled_back[counted], ~kept[counted])


@given(tokens=batches(), radius=st.floats(0.05, 20.0))
def test_spo_is_drpo_of_power_one(tokens: Tokens, radius: float) -> None:
    one, other = gradient(SPO(radius), tokens), gradient(DRPO(radius, power=1.0), tokens)
    assert torch.allclose(one, other, rtol=1e-8, atol=0)


@each_case
def test_extreme_ratios_stay_finite_and_exact_in_float32(case: Case) -> None:
    """Log-ratios from -40 to 40, and of 100 where mu underflows; the likelier of pi and mu at e^-0.5, e^-5, e^-30."""
    log_ratio = [*(float(k) for k in range(-40, 41, 4)), -1.0, 1.0, 19.0, 21.0, 100.0]
    columns: list[tuple[float, float, float]] = []
    for top in (-0.5, -5.0, -30.0):
        for a in (1.5, -1.5):
            columns += [(top + min(k, 0), top - max(k, 0), a) for k in log_ratio]
    logp, behavior_logp, advantage = (list(c) for c in zip(*columns, strict=True))
    tokens = make_tokens(logp, behavior_logp, advantage, dtype=torch.float32)
    check_gradient_and_weight(case, tokens, [t for t in of(case, tokens) if t])
    assert torch.isfinite(case.objective(tokens).loss).all()


@pytest.mark.parametrize("mu", [1e-12, 0.5, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("pi", [3e-12, 1e-6, 0.25, 0.75, 1 - 3e-7, 1 - 1e-10])
@each_precision
def test_binary_kl_at_the_ends_of_the_interval(mu: float, pi: float, dtype: torch.dtype) -> None:
    """The mask flips within 1e-4 of the divergence that 50 digits give."""
    tokens = make_tokens([math.log1p(pi - 1)], [math.log1p(mu - 1)], [1.0 if pi > mu else -1.0], dtype=dtype)
    if pi > 0.9:
        tokens.logp[0] = math.log1p(-(1 - pi))
    with localcontext(reference.DIGITS):
        far = float(reference.binary_kl(*(Decimal(x.item()) for x in (tokens.behavior_logp, tokens.logp))))
    for objective in (lambda d: SymmetricMask(d, "kl"), lambda d: DPPO(d, divergence="kl")):
        assert gradient(objective(far * (1 + 1e-4)), tokens).item() != 0
        assert gradient(objective(far * (1 - 1e-4)), tokens).item() == 0


# ------------------------------------------------------------------------------------------------------ golden vectors

GOLDEN = json.loads((Path(__file__).parent / "golden" / "objectives.json").read_text())
GOLDEN_NAMES = {
    "DRPO": (DRPO, reference.drpo),
    "SPO": (SPO, reference.spo),
    "DPPO": (DPPO, reference.dppo),
    "DPPO(verl)": (DPPO, reference.dppo),
    "PPOClip": (PPOClip, reference.ppo_clip),
    "CISPO": (CISPO, reference.cispo),
    "SAPO": (SAPO, reference.sapo),
    "GSPO": (GSPO, reference.gspo),
}
SHORT = {"delta_low": "low", "delta_high": "high"}


def golden_cases() -> list[tuple[Case, Tokens, Tensor, list[float] | None]]:
    """Every golden entry: the objective and its formula, the inputs, the gradients, the losses where it has them."""
    cases = []
    for data in GOLDEN:
        columns = (data[k] for k in ("logp", "behavior_logp", "advantage", "keep", "sequence"))
        tokens = make_tokens(*columns)
        for entry in data["results"]:
            make, rule = GOLDEN_NAMES[entry["objective"]]
            params = entry["params"]
            objective = make(**params)
            formula = rule(
                **{SHORT.get(name, name): value for name, value in params.items()} if make is DPPO else params
            )
            case = Case(f"{data['seed']}: {entry['source']}: {objective!r}", objective, formula)
            cases.append((case, tokens, torch.tensor(entry["grad"], dtype=torch.float64), entry.get("loss")))
    return cases


GOLDEN_CASES = golden_cases()
each_golden = pytest.mark.parametrize(
    ("case", "tokens", "grad", "loss"), GOLDEN_CASES, ids=[c.spec for c, *_ in GOLDEN_CASES]
)


@each_golden
def test_golden_vectors(case: Case, tokens: Tokens, grad: Tensor, loss: list[float] | None) -> None:
    """The methods' authors' own programs, in float64: within 1e-9, and within 1e-5 of them in float32."""
    kept, truth = tokens.keep, [t for t in of(case, tokens) if t]
    want, scale = grad[kept].tolist(), [t.scale for t in truth]
    assert len(want) >= 30
    assert min(t.margin for t in truth) > 1e-4
    check(torch.tensor([t.gradient for t in truth], dtype=torch.float64), want, scale, truth, torch.float64)
    for dtype in (torch.float64, torch.float32):
        check(gradient(case.objective, cast(tokens, dtype))[kept], want, scale, truth, dtype)
    if loss is not None:
        want_loss, size = torch.tensor(loss, dtype=torch.float64)[kept].tolist(), [t.scale + abs(t.loss) for t in truth]
        check(case.objective(tokens).loss[kept], want_loss, size, truth, torch.float64)


ENTRIES_OF_2026 = [
    (f"{data['seed']}: {i}: {entry['objective']}", data, entry)
    for data in golden_2026.GOLDEN
    for i, entry in enumerate(data["results"])
]


@pytest.mark.parametrize(
    ("data", "entry"), [row[1:] for row in ENTRIES_OF_2026], ids=[name for name, *_ in ENTRIES_OF_2026]
)
def test_golden_vectors_of_2026(data: dict, entry: dict) -> None:
    """Ten frameworks' programs, in float64, in whose sums we have the same gradients; as `test_golden_vectors`."""
    ours = golden_2026.OURS[entry["objective"]](entry["params"])
    tokens = make_tokens(*(data[k] for k in ("logp", "behavior_logp", "advantage", "keep", "sequence")))
    more = {k: torch.tensor(data[k], dtype=torch.float64) for k in ("proximal_logp", "score", "reference_logp")}
    tokens = dataclasses.replace(tokens, **more)
    kept = tokens.keep
    if ours.masked_count:
        tokens = dataclasses.replace(tokens, keep=torch.ones_like(kept), advantage=tokens.advantage * kept)
    case = Case("", ours.objective, ours.rule)
    truth = [t for t, counts in zip(of(case, tokens), kept.tolist(), strict=True) if t and counts]
    grad = torch.tensor(entry["grad"], dtype=torch.float64)
    if ours.per_sequence:
        grad = grad * Sequences.of(tokens).count(grad)
    want, scale = grad[kept].tolist(), [ours.tolerance * (t.scale + abs(t.gradient)) for t in truth]
    assert sum(t.margin > 1e-4 for t in truth) > 0.8 * len(want) > 30
    check(torch.tensor([t.gradient for t in truth], dtype=torch.float64), want, scale, truth, torch.float64)
    for dtype in (torch.float64, torch.float32):
        near = dataclasses.replace(cast(tokens, dtype), **{name: column.to(dtype) for name, column in more.items()})
        check(gradient(ours.objective, near)[kept], want, scale, truth, dtype)
    if ours.same_value and entry.get("loss"):
        wanted = torch.tensor(entry["loss"], dtype=torch.float64)[kept].tolist()
        size = [ours.tolerance * (t.scale + abs(t.loss)) for t in truth]
        check(ours.objective(tokens).loss[kept], wanted, size, truth, torch.float64)


# --------------------------------------------------------------------------------------------- masks, splits, shuffles

HOSTILE = [
    (0.0, -200.0, 1.0),
    (-200.0, 0.0, -1.0),
    (math.nan, -1.0, 1.0),
    (-1.0, math.nan, 1.0),
    (math.inf, -math.inf, 1.0),
    (-math.inf, math.inf, math.nan),
    (-1.0, -1.0, math.inf),
]


def with_hostile_slots(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """The tokens with masked garbage before and between them; and where the old ones now stand."""
    n, k = len(tokens.logp), len(HOSTILE)
    place = torch.arange(n) * 2 + 1
    size = 2 * n + k
    rows = torch.tensor([HOSTILE[i % k] for i in range(size)], dtype=torch.float64)
    out = Tokens(
        *(rows[:, j].clone() for j in range(3)),
        torch.zeros(size).bool(),
        torch.arange(size) % (len(tokens.logp) + 1),
        torch.full((size,), math.nan, dtype=torch.float64),
        proximal_logp=torch.full((size,), math.nan, dtype=torch.float64),
        score=torch.full((size,), math.nan, dtype=torch.float64),
        reference_logp=torch.full((size,), math.nan, dtype=torch.float64),
    )
    for f in (f.name for f in dataclasses.fields(out) if f.name != "position"):
        getattr(out, f)[place] = getattr(tokens, f)
    return out, place


def backward(objective: Objective, tokens: Tokens, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The total and its gradient with respect to logp."""
    logp = tokens.logp.clone().requires_grad_()
    loss = total(objective, dataclasses.replace(tokens, logp=logp), weight)
    loss.backward()
    assert logp.grad is not None
    return loss.detach(), logp.grad


@each_weighing
def test_masked_token_is_a_removed_token(objective: Objective, reduction: str) -> None:
    """To the bit, whatever stands in the masked slots, and whether or not the gradient is asked for."""
    weigh = parse_spec(reduction, reductions.REGISTRY)
    tokens = random_tokens([4, 1, 6, 3], seed=2)
    kept = take(tokens, tokens.keep.nonzero()[:, 0])
    masked, place = with_hostile_slots(tokens)
    loss, slope = backward(objective, kept, weigh(kept.keep, kept.sequence))
    other_loss, other_slope = backward(objective, masked, weigh(masked.keep, masked.sequence))
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()
    assert loss != 0
    assert torch.equal(other_loss, loss)
    assert torch.equal(other_slope[masked.keep], slope)
    assert (other_slope[~masked.keep] == 0).all()
    assert torch.equal(gradient(objective, masked)[place[tokens.keep]], gradient(objective, kept))


@each_objective
def test_fully_masked_part_backpropagates_zero(objective: Objective) -> None:
    masked, _ = with_hostile_slots(take(random_tokens([3]), torch.tensor([], dtype=torch.int64)))
    weight = reductions.token_mean(masked.keep, masked.sequence)
    loss, slope = backward(objective, masked, weight)
    assert loss == 0
    assert (slope == 0).all()
    assert (gradient_weight(objective, masked) == 1).all()


@each_objective
def test_loss_of_ordinary_masked_slots_is_finite(objective: Objective) -> None:
    """For a caller who multiplies by a mask of his own instead of using `total`."""
    tokens = random_tokens([3, 2])
    for some in (tokens.keep & (tokens.sequence == 0), torch.zeros(5).bool()):
        assert torch.isfinite(objective(dataclasses.replace(tokens, keep=some)).loss).all()


LENGTHS = [4, 1, 6, 3, 2, 7, 1, 5]
SPLITS = {"1x8": [1] * 8, "2x4": [4, 4], "3+5": [3, 5]}


def split_gradient(objective: Objective, tokens: Tokens, weight: Tensor, split: list[int]) -> Tensor:
    """The gradient, part by part, of the batch's first sequences, then the next ones, ..."""
    slope, first = torch.full_like(tokens.logp, math.nan), 0
    for n in split:
        index = ((tokens.sequence >= first) & (tokens.sequence < first + n)).nonzero()[:, 0]
        slope[index] = backward(objective, take(tokens, index), weight[index])[1]
        first += n
    return slope


@each_weighing
def test_gradient_does_not_depend_on_the_split_or_the_order(objective: Objective, reduction: str) -> None:
    """With weights fixed over the whole batch. Sums over ranks are not covered here."""
    tokens = in_order(random_tokens(LENGTHS, seed=3))
    objective = of_batch(objective, tokens)
    weight = parse_spec(reduction, reductions.REGISTRY)(tokens.keep, tokens.sequence)
    whole = backward(objective, tokens, weight)[1]
    assert whole.abs().max() > 1e-3
    for split in SPLITS.values():
        assert torch.allclose(split_gradient(objective, tokens, weight, split), whole, rtol=0, atol=1e-10)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(4))
    shuffled = take(tokens, order)
    again = parse_spec(reduction, reductions.REGISTRY)(shuffled.keep, shuffled.sequence)
    assert torch.allclose(backward(objective, shuffled, again)[1], whole[order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_recomputed_for_each_part_are_another_loss(reduction: str) -> None:
    """The negative control: the mean over parts of each part's own mean, as gradient accumulation is often written."""
    tokens, objective, weigh = random_tokens(LENGTHS, seed=3), DRPO(0.2), parse_spec(reduction, reductions.REGISTRY)
    whole = backward(objective, tokens, weigh(tokens.keep, tokens.sequence))[1]
    weight = torch.empty_like(tokens.logp)
    for part in (tokens.sequence < 3, tokens.sequence >= 3):
        weight[part] = weigh(tokens.keep[part], tokens.sequence[part]).double() / 2
    careless = split_gradient(objective, tokens, weight, SPLITS["3+5"])
    assert (careless - whole).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------- inputs, precision, flow


@each_objective
def test_gradient_flows_only_through_logp_and_inputs_stay_as_they_are(objective: Objective) -> None:
    tokens = random_tokens([3, 4])
    columns = (
        *(tokens.logp, tokens.behavior_logp, tokens.advantage, tokens.divergence, tokens.proximal_logp),
        *(tokens.score, tokens.reference_logp),
    )
    leaves = [t.clone().requires_grad_() for t in columns]
    live = Tokens(*leaves[:3], tokens.keep.clone(), tokens.sequence.clone(), leaves[3])
    live = dataclasses.replace(live, proximal_logp=leaves[4], score=leaves[5], reference_logp=leaves[6])
    total(objective, live, torch.ones_like(tokens.logp)).backward()
    for asked in (dataclasses.replace(tokens, logp=live.logp), tokens):
        assert not gradient(objective, asked).requires_grad
        assert not gradient_weight(objective, asked).requires_grad
    assert not tokens.logp.requires_grad
    assert live.logp.grad is not None
    assert live.logp.grad.abs().max() > 0
    for other in leaves[1:]:
        assert other.grad is None or (other.grad == 0).all()
    for name in ("logp", "behavior_logp", "advantage", "keep", "sequence"):
        assert torch.equal(getattr(live, name), getattr(tokens, name))
        assert getattr(live, name)._version == 0


@each_objective
def test_objective_never_asks_the_device_for_a_number(objective: Objective) -> None:
    """Tensors without data: an `.item()`, or a shape that depends on the data, would raise."""
    number = torch.empty(5, device="meta")
    tokens = Tokens(number, number, number, number.bool(), number.long(), number, None, number, number, number)
    assert objective(tokens).loss.shape == (5,)


@each_case
def test_bfloat16_inputs_are_widened_before_any_arithmetic(case: Case) -> None:
    """The only error is the rounding of the result; arithmetic in bfloat16 would put many tokens on the wrong side."""
    grid = -torch.logspace(-3, 1, 11)
    logp, behavior_logp = (g.reshape(-1) for g in torch.meshgrid(grid, grid, indexing="ij"))
    n = len(logp)
    advantage = torch.ones(n)
    advantage[::2] = -1
    tokens = cast(Tokens(logp, behavior_logp, advantage, torch.ones(n).bool(), torch.arange(n)), torch.bfloat16)
    slope = gradient(case.objective, tokens)
    assert slope.dtype == torch.bfloat16
    assert case.objective(tokens).loss.dtype == torch.float32
    wrong = [
        (t, got)
        for t, got in zip(of(case, tokens), slope.tolist(), strict=True)
        if t and t.margin > 1e-4 and abs(got - t.gradient) > 2**-8 * t.scale + UNDERFLOW[torch.bfloat16]
    ]
    assert not wrong


# ------------------------------------------------------------------------------------- spec, equality, parameters


@each_case
def test_spec_round_trip(case: Case) -> None:
    assert parse_spec(case.spec, REGISTRY) == case.objective
    assert parse_spec(format_spec(case.objective, REGISTRY), REGISTRY) == case.objective
    assert type(parse_spec(case.spec, REGISTRY)) is type(case.objective)


positive = st.floats(1e-6, 1e3)
objectives = st.one_of(
    st.builds(ImportanceSampling, st.none() | positive),
    st.builds(PPOClip, st.floats(0, 1), st.floats(0, 10), st.none() | st.floats(1.001, 10), st.none() | positive),
    st.builds(SPO, positive),
    st.builds(DPPO, positive, st.none() | positive, st.sampled_from(["tv", "kl", "topk_tv", "topk_kl"]), positive),
    st.builds(DRPO, positive, st.floats(0, 1), st.none() | st.floats(0, 1), st.booleans()),
    st.builds(CISPO, st.floats(0, 1), st.floats(0, 10)),
    st.builds(GSPO, st.floats(0, 1), st.floats(0, 10)),
    st.builds(SAPO, positive, positive),
    st.builds(SymmetricMask, positive, st.sampled_from(["tv", "kl"])),
    st.builds(DivergencePenalty, st.sampled_from(["tv", "k1", "k3"]), positive),
    st.builds(IPO, positive, positive),
    st.builds(IcePop, st.floats(0, 1), st.floats(1.1, 10)),
    st.builds(KPop, positive),
    st.builds(CPPO, positive, st.floats(0.01, 1), positive, st.none() | st.integers(1, 99), st.none() | positive),
    st.builds(RefKL, positive),
    st.builds(VESPO, positive, positive, positive, positive, st.none() | positive),
    st.builds(GMPO, st.floats(0, 3), st.floats(0, 3)),
    st.builds(M2PO, positive, st.floats(0, 1), st.floats(0, 3)),
    st.builds(M2POAReaL, positive),
    st.builds(ClipCov, st.floats(0, 1), st.floats(0, 10), st.floats(1e-6, 1), st.floats(-1, 1), st.floats(1.1, 5)),
    st.builds(KLCov, st.floats(1e-6, 1), positive),
    st.builds(TOPR, positive, positive, st.sampled_from(RATIOS)),
    st.builds(
        DRPOEff, positive, st.sampled_from(["log_tanh", "power"]), low=st.floats(0, 0.9), alpha=st.floats(0.1, 1)
    ),
    st.builds(DRPOEff, positive, st.just("tanh_bound"), st.sampled_from(["fisher", "bkl_grad"]), metric_clip=positive),
)
factors = st.one_of(
    st.builds(Band, st.floats(0, 1), st.floats(1.1, 10), st.sampled_from(["token", "sequence", "geometric", "every"])),
    st.builds(Reject, st.sampled_from([s for s in STATISTICS if not s.endswith("k1")]), positive),
    st.builds(Reject, st.sampled_from(["token_k1", "seq_mean_k1"]), st.floats(1.1, 9), st.floats(0, 1)),
    st.builds(OPSM, positive),
    st.builds(BinaryKL, positive),
    st.builds(SecondMoment, positive),
    st.builds(ImportanceWeight, cap=st.floats(1, 9), floor=st.floats(0, 1)),
    st.builds(
        ImportanceWeight, st.sampled_from(RATIOS), positive, st.floats(0, 1), st.none() | st.floats(2, 9), st.booleans()
    ),
)
products = objectives | st.builds(Product, objectives, st.lists(factors, min_size=1, max_size=3).map(tuple))
sums = products | st.builds(Sum, st.lists(st.tuples(positive, products), min_size=2, max_size=3).map(tuple))


@given(sums)
def test_spec_keeps_every_parameter(objective: Objective) -> None:
    again = parse_spec(format_spec(objective, REGISTRY), REGISTRY)
    assert again == objective
    assert hash(again) == hash(objective)
    assert repr(again) == repr(objective)


class OwnObjective:
    """A user's objective: nothing but a callable of the right shape, imported by its name."""

    tokenwise = True
    needs: frozenset[str] = frozenset()
    vanishes_at_zero_advantage = True
    floor = 0.0

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(-(tokens.advantage + self.floor) * tokens.logp)


OWN = OwnObjective()


def test_own_objective_needs_no_registration() -> None:
    assert parse_spec(f"{__name__}:OWN", REGISTRY) is OWN
    assert isinstance(OWN, Objective)
    tokens = random_tokens([3])
    assert torch.equal(gradient(OWN, tokens), torch.where(tokens.keep, -tokens.advantage, 0))
    assert vanishes_at_zero_advantage(OWN)
    restless = OwnObjective()
    restless.floor = 1e-3
    with pytest.raises(InputError, match="promises vanishes_at_zero_advantage=True, but has a gradient at advantage 0"):
        vanishes_at_zero_advantage(restless)
    restless.vanishes_at_zero_advantage = False
    assert not vanishes_at_zero_advantage(restless)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropo(0.2)", "did you mean 'drpo'"),
        ("dpo(0.2)", "did you mean"),
        ("grpo(0.2)", "did you mean"),
        ("zzz", "known: .*drpo.*penalty"),
        ("drpo(0.2, detla=1)", "detla"),
        ("drpo(-1)", "delta"),
        ("drpo(0.2", "form"),
        ("drpo(__import__('os'))", "form"),
        ("drpo(0.1 + 0.1)", "form"),
        ("penalty('k2', 1)", "kind"),
        ("band(0.5, 2)*opsm(1)", "must have one objective, not none"),
        ("ppo*drpo(0.2)*opsm(1)", "must have one objective, not 2"),
        ("drpo(0.2) - 0.1*k2", "weight of a term=-0.1"),
        ("none*band(2, 1)", "high"),
        ("none*proximal*opsm(1)*proximal", "factors="),
        ("none*reject('seq_mean_k4', 1)", "statistic"),
        ("none*reject('seq_mean_k3', 1, 0.5)", "upper bound alone"),
        ("reinforce*weight('token')", "needs a cap or a bound above"),
        ("drpo_eff(0.2, 'clip', 'fisher')", "metric='fisher': the map 'clip' reads the log-ratio alone"),
        ("", "form"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_spec(text, REGISTRY)


@pytest.mark.parametrize(
    ("make", "field", "wrong"),
    [
        (ImportanceSampling, "max_ratio", (0, -1, math.nan, math.inf)),
        (PPOClip, "low", (-0.1, 1.1, math.nan)),
        (PPOClip, "high", (-0.1, math.nan, math.inf)),
        (PPOClip, "dual", (1, 0.5, math.nan)),
        (PPOClip, "max_ratio", (0, math.inf)),
        (SPO, "epsilon", (0, -1, math.nan, math.inf, "0.2", None)),
        (DPPO, "delta_low", (0, -1, math.nan)),
        (DPPO, "delta_high", (0, -1, math.nan)),
        (DPPO, "divergence", ("js", "", None)),
        (DPPO, "max_ratio", (0, math.nan)),
        (DRPO, "delta", (0, -0.2, math.nan, math.inf, True)),
        (DRPO, "power", (-0.1, 1.1, math.nan)),
        (DRPO, "outside", (-0.1, math.nan)),
        (DRPO, "advantage_weighted", (1, None, "no")),
        (CISPO, "low", (-0.1, 1.1, math.nan)),
        (CISPO, "high", (-0.1, math.nan)),
        (GSPO, "low", (-0.1, 1.1, math.nan)),
        (GSPO, "high", (-0.1, math.nan)),
        (SAPO, "tau_positive", (0, -1, math.nan)),
        (SAPO, "tau_negative", (0, -1, math.nan)),
        (SymmetricMask, "delta", (0, -1, math.nan)),
        (SymmetricMask, "divergence", ("js", "topk_tv")),
        (DivergencePenalty, "kind", ("k2", "")),
        (DivergencePenalty, "coefficient", (-1, math.nan)),
        (IPO, "delta", (0, math.nan)),
        (IPO, "max_ratio", (0, math.inf)),
        (IcePop, "low", (-1, math.nan)),
        (IcePop, "high", (0.5, math.inf)),
        (KPop, "delta", (0, math.nan)),
        (CPPO, "delta", (0, math.nan)),
        (CPPO, "w_min", (0, 1.1)),
        (CPPO, "delta_b", (0, math.inf)),
        (CPPO, "horizon", (0, 1.5, True)),
        (CPPO, "max_ratio", (0, math.inf)),
        (RefKL, "delta", (0, math.nan)),
        (VESPO, "k_positive", (0, math.nan)),
        (VESPO, "lambda_positive", (0, math.nan)),
        (VESPO, "k_negative", (0, math.nan)),
        (VESPO, "lambda_negative", (0, math.nan)),
        (VESPO, "max_ratio", (0, math.nan)),
        (TOPR, "positive", (0, math.nan)),
        (TOPR, "negative", (0, math.inf)),
        (TOPR, "over", ("every", "")),
        (DRPOEff, "delta", (0, math.nan)),
        (DRPOEff, "map", ("tanh", "")),
        (DRPOEff, "metric", ("kl", "")),
        (DRPOEff, "low", (-0.1, 1, 1.5, math.nan)),
        (DRPOEff, "high", (1, math.inf)),
        (DRPOEff, "beta", (0, math.nan)),
        (DRPOEff, "alpha", (0, 1.1)),
        (DRPOEff, "mass", (0, math.nan)),
        (DRPOEff, "metric_clip", (0, math.inf)),
        (GMPO, "low", (-1, math.nan)),
        (GMPO, "high", (-1, math.inf)),
        (M2PO, "budget", (0, math.nan)),
        (M2PO, "floor_low", (-1, 1.1)),
        (M2PO, "floor_high", (-1, math.nan)),
        (M2POAReaL, "threshold", (0, math.nan)),
        (ClipCov, "low", (-1, 1.1)),
        (ClipCov, "high", (-1, math.nan)),
        (ClipCov, "fraction", (0, 1.1)),
        (ClipCov, "cov_low", (math.nan, -math.inf)),
        (ClipCov, "cov_high", (0.5, math.inf)),
        (KLCov, "fraction", (0, 1.1)),
        (KLCov, "coefficient", (0, math.nan)),
        (Band, "low", (-1, math.nan)),
        (Band, "high", (0.5, math.inf)),
        (Band, "over", ("row", "")),
        (Reject, "statistic", ("k3", "seq_min_k3")),
        (Reject, "low", (-1, math.nan)),
        (Reject, "high", (0, math.nan)),
        (OPSM, "delta", (0, math.nan)),
        (BinaryKL, "delta", (0, math.nan)),
        (SecondMoment, "threshold", (0, math.nan)),
        (ImportanceWeight, "over", ("every", "")),
        (ImportanceWeight, "cap", (0, math.nan)),
        (ImportanceWeight, "low", (-1, math.nan)),
        (ImportanceWeight, "high", (0, math.inf)),
        (ImportanceWeight, "floor", (-1, 2.5, math.nan)),
    ],
)
def test_wrong_parameter_is_refused_by_name(make: type, field: str, wrong: tuple[object, ...]) -> None:
    needed = {
        SPO: {"epsilon": 0.2},
        SymmetricMask: {"delta": 0.2},
        DivergencePenalty: {"kind": "k3", "coefficient": 1},
        Band: {"low": 0.5, "high": 2.0},
        BinaryKL: {"delta": 0.1},
        Reject: {"statistic": "seq_mean_k1", "high": 1.0},
        ImportanceWeight: {"cap": 2.0},
    }
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{field}="):
            make(**{**needed.get(make, {}), field: value})


def test_defaults_are_the_programs() -> None:
    assert dataclasses.astuple(DRPOEff()) == (12.5, "log_tanh", "log_ratio", 0.0, 2.0, 1.0, 0.5, 1e-4, None)
    assert DRPOEff(alpha=1).alpha == 1 and DRPO(outside=0).outside == 0
    assert dataclasses.astuple(VESPO()) == (2.0, 3.0, 3.0, 2.0, None)
    assert dataclasses.astuple(RefKL()) == (0.2,)
    assert dataclasses.astuple(SecondMoment()) == dataclasses.astuple(M2POAReaL()) == (0.04,)
    assert dataclasses.astuple(TOPR()) == (1.0, 1.0, "token")


def test_clip_cov_drops_its_share_of_the_kept_tokens_in_the_mean() -> None:
    """At random among the eligible, where tokens of A = 0 count and masked ones do not; any split drops the same."""
    make, n = torch.Generator().manual_seed(0), 6000
    logp = -4 * torch.rand(n, generator=make, dtype=torch.float64) - 0.1
    advantage = torch.randint(-1, 2, (n,), generator=make).double()
    keep = torch.rand(n, generator=make) < 0.5
    behavior_logp = torch.where(advantage == 0, (logp + 1).clamp(max=0), logp)  # no clip binds where A is 0
    tokens = Tokens(logp, behavior_logp, advantage, keep, torch.arange(n))
    cov = (advantage - advantage[keep].mean()) * (logp - logp[keep].mean())
    eligible = keep & (cov > 0.1) & (cov < 1)
    dropping = of_batch(ClipCov(fraction=0.1, cov_low=0.1, cov_high=1.0), tokens)
    dropped = keep & (advantage != 0) & (gradient(dropping, tokens) == 0)
    share, most = 0.1 * int(keep.sum()) / int(eligible.sum()), int((eligible & (advantage != 0)).sum())
    assert not (dropped & ~eligible).any()
    assert abs(int(dropped.sum()) - share * most) < 4 * math.sqrt(share * most)
    half = torch.arange(n) % 2 == 0
    assert torch.equal(gradient(dropping, take(tokens, half)), gradient(dropping, tokens)[half])
    moved = dataclasses.replace(tokens, logp=logp - 1e-4)
    assert not torch.equal(gradient(dropping, moved) == 0, gradient(dropping, tokens) == 0)
    few = make_tokens([-1.0, -2.0, -1.9], [-1.0, -2.0, -1.9], [1.0, -0.1, -0.1])  # cov: 0.46, 0.13, 0.10
    assert (gradient(ClipCov(fraction=1e-6, cov_low=0.3), few) == 0).tolist() == [True, False, False]  # at least one
    for low, one_of in ((0.3, 1), (0.12, 2), (0.05, 3)):
        assert of_batch(ClipCov(fraction=1e-6, cov_low=low), few).probability.item() == 1 / one_of


def test_the_edges_of_masks_are_the_printed_ones() -> None:
    """A success is above 0; OPSM keeps A = 0; a token that has not moved is kept, however much its prefix has spent."""
    failed = dataclasses.replace(probable(0.5, 0.2, 1.0), score=torch.zeros(1).double())
    assert gradient(TOPR(2.0, 3.0), failed).item() == -3.0
    for a, kept in ((0.0, True), (-1.0, False)):
        assert (gradient(Product(K2(), (OPSM(0.1),)), probable(0.1, 0.5, a)).item() != 0) == kept
    on_policy = probable(0.5, 0.5, 1.0)
    for low, high in ((1.0, 2.0), (0.5, 1.0)):
        for over in (*RATIOS, "every"):
            assert gradient(Product(Reinforce(), (Band(low, high, over),)), on_policy).item() == -1
        assert gradient(Product(Reinforce(), (Reject("token_k1", high, low),)), on_policy).item() == -1
        assert gradient(IcePop(low, high), on_policy).item() == -1
    nothing = Product(Reinforce(), (ImportanceWeight("token", high=2.0, low=1.5, normalize=True),))
    assert (gradient(nothing, random_tokens([3], spread=0.0)) == 0).all()
    spent = make_tokens([math.log(0.9)] * 4 + [-1.0], [math.log(0.2)] * 4 + [-1.0], [1.0] * 5, sequence=[0] * 5)
    assert gradient(CPPO(0.1, 0.8, 0.01), spent).tolist() == [0, 0, 0, 0, -1]


def test_cppos_schedule_and_budget_are_those_of_the_whole_sequence() -> None:
    """The 90 % quantile lies between the budget's bounds: what a large first shift has spent comes back bit by bit. In
    the second sequence the last token's weight decides.
    """
    shifts = [0.5, *[0.1] * 8, 0.15, 0.1, *[0.0] * 10, 0.21]
    tokens = make_tokens(
        [math.log(0.2 + x) for x in shifts], [math.log(0.2)] * 22, [1.0] * 22, sequence=[0] * 11 + [1] * 11
    )
    for w_min, kept in ((1.0, {8, 10}), (0.5, {21})):
        case = Case("", CPPO(0.12, w_min, 0.1), reference.cppo(0.12, w_min, 0.1))
        slope, _ = check_gradient_and_weight(case, tokens, [t for t in of(case, tokens) if t])
        assert kept <= {*slope.nonzero()[:, 0].tolist()} and slope[0] == 0


@pytest.mark.parametrize(("pi", "a"), [(0.6, 1.0), (0.3, -1.0)])
def test_a_token_on_the_border_of_a_region_is_inside(pi: float, a: float) -> None:
    """To the bit; a radius smaller by 1e-9 leaves it outside, and what masks then drops it."""
    nothing = Reinforce()
    tokens = probable(pi, 0.4, a)
    apart, away, r = prob_diff(tokens).abs().item(), prob_diff(tokens, 1.0).abs().item(), ratio(tokens).item()
    l, m = tokens.logp, tokens.behavior_logp
    forward, back = bernoulli_kl(m, l).item(), bernoulli_kl(l, m).item()
    radii: list[tuple[Callable[[float], Objective], float]] = [
        *((make, apart) for make in (DPPO, SymmetricMask, IPO, CPPO)),
        (lambda d: DPPO(d if a < 0 else 9.0, 9.0 if a < 0 else d), apart),
        (lambda d: DPPO(d, divergence="topk_tv"), tokens.divergence.item()),  # type: ignore[union-attr]
        *((lambda d, make=make: make(d, divergence="kl"), forward) for make in (DPPO, SymmetricMask)),
        *((make, max(forward, back)) for make in (KPop, lambda d: Product(nothing, (BinaryKL(d),)))),
        (lambda d: Product(nothing, (Reject("token_k2", d),)), (l - m).square().item() / 2),
        (lambda d: Product(nothing, (Reject("seq_mean_k3", d),)), (prob_diff(tokens, 1.0) - (l - m)).item()),
        (lambda d: IcePop(0.01, d) if a > 0 else IcePop(1 / d, 9.0), max(r, 1 / r)),
        *((make, apart) for make in (DRPO, lambda d: Sum(((0.5, DRPO(d)),)))),
        *((make, away) for make in (SPO, lambda d: PPOClip(min(d, 1.0), d), lambda d: GSPO(min(d, 1.0), d))),
        (lambda d: GMPO(d, d), (l - m).abs().item()),
        (lambda d: Product(nothing, (OPSM(d) if a < 0 else Band(0.0, 1 + d),)), (m - l).item() if a < 0 else r - 1),
    ]
    for make, radius in radii:
        for size, outside in ((radius, False), (radius * (1 - 1e-9), True)):
            objective = make(size)
            assert objective.out_of_region(tokens).item() == outside, objective  # type: ignore[attr-defined]
            if not isinstance(objective, DRPO | SPO | Sum):
                assert (gradient(objective, tokens).item() == 0) == outside, objective


def test_cppos_last_token_has_the_weight_w_min() -> None:
    """In sequences of 2 and 3 tokens; at the threshold itself it is kept."""
    for n in (2, 3):
        tokens = make_tokens([-2.0] * (n - 1) + [-1.0], [-2.0] * n, [1.0] * n, sequence=[0] * n)
        moved = prob_diff(tokens)[-1].item()
        for delta, out in ((0.5 * moved, False), (0.4999 * moved, True)):
            assert CPPO(delta, w_min=0.5).out_of_region(tokens).tolist() == [False] * (n - 1) + [out]


@pytest.mark.parametrize("q", [0.0, 0.35, 0.9, 1.0])
def test_a_quantile_is_linear_between_two_kept_tokens(q: float) -> None:
    tokens = random_tokens([1, 2, 5, 12, 30])
    found = Sequences.of(tokens).quantile(tokens.logp, q)
    for i in range(5):
        mine = tokens.sequence == i
        want = torch.quantile(tokens.logp[mine & tokens.keep], q)
        assert torch.allclose(found[mine], want.expand(int(mine.sum())), rtol=1e-12)


def test_what_is_composed_has_a_spec_or_is_refused() -> None:
    both = Sum(((1.0, K2()), (2.0, Reinforce())))
    refused: dict[str, Callable[[], object]] = {
        "factors=(): write at least one": lambda: Product(K2(), ()),
        "Sum within another: write a factor of each term": lambda: Product(both, (OPSM(0.1),)),
        "must be factors": lambda: Product(K2(), (OPSM(0.1), K2())),  # type: ignore[arg-type]
        "terms=(): a sum of objectives has no term": lambda: Sum(()),
        "weight of a term=0.0": lambda: Sum(((0.0, K2()),)),
        "Sum within another: write one sum of all terms": lambda: Sum(((1.0, both),)),
        "Sum within another: write one 'proximal' in each term": lambda: Decoupled(both),
        "Decoupled within another": lambda: Decoupled(Decoupled(K2())),
        "is a factor": lambda: Decoupled(OPSM(0.1)),  # type: ignore[arg-type]
        "proximal is no factor by itself": lambda: Proximal().factor(random_tokens([2])),
        "factors=(Proximal(),): must be factors": lambda: Decoupled(K2(), (Proximal(),)),
    }
    for said, make in refused.items():
        with pytest.raises(InputError, match=re.escape(said)):
            make()
    product = Product(TOPR(), (ImportanceWeight(cap=2.0, normalize=True),))
    assert product.needs == {"score", "batch"} == Sum(((1.0, product), (1.0, K2()))).needs
    assert Decoupled(product).needs == {"score", "batch", "proximal_logp"} == Decoupled(TOPR(), product.factors).needs
    assert product.vanishes_at_zero_advantage and not Product(K2(), (OPSM(0.1),)).vanishes_at_zero_advantage


@pytest.mark.parametrize("objective", [M2PO(0.04), M2POAReaL(0.04), ClipCov(), KLCov()])
def test_an_objective_of_a_known_batch_promises_what_it_did(objective: Any) -> None:
    known = objective.of_batch(random_tokens([3, 4]))
    assert known.tokenwise and known.needs == frozenset()
    assert vanishes_at_zero_advantage(known) == vanishes_at_zero_advantage(objective)


def test_clip_cov_drops_where_the_clip_does_not_bind() -> None:
    half = math.log(0.5)  # ratios of 1/2 and 2 by turns
    tokens = make_tokens([-1.0] * 6, [-1 - half, -1 + half] * 3, [1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    # Of a batch with these means every covariance is between 8 and 10.
    means = Covariance(torch.tensor([-9.0]), torch.tensor([-2.0]))
    known = Dropping(ClipCov(cov_low=7.0, cov_high=12.0), means, torch.ones(1))
    assert known.eligible(tokens).tolist() == [True, False, False, True, True, True]


def test_vespo_asks_for_the_proximal_policy_with_a_bound_alone() -> None:
    assert VESPO().needs == frozenset() and VESPO(max_ratio=3.0).needs == {"proximal_logp"}


class Telling:
    """A user's objective with a figure, which says nothing about A = 0."""

    tokenwise = True
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(-tokens.advantage * tokens.logp, {"told": tokens.logp.detach()})


def test_what_is_composed_is_of_all_its_parts() -> None:
    """Their figures, promises, statistics of the batch and regions."""
    told, tokens = Telling(), random_tokens([3, 4])
    for made in (Product(told, (OPSM(0.1),)), Sum(((1.0, told), (1.0, Reinforce()))), Decoupled(told)):
        assert made.vanishes_at_zero_advantage is False and made(tokens).metrics.keys() == {"told"}
    for made in (Sum(((1.0, K2()), (1.0, GSPO()))), Decoupled(GSPO()), Decoupled(K2(), (OPSM(0.1),))):
        assert not made.tokenwise
    band, inner = Band(0.7, 1.4), Product(ImportanceSampling(), (OPSM(0.1),))
    assert Decoupled(inner, (band,)).parts == (ImportanceSampling(), OPSM(0.1), Proximal(), band)
    assert summands(Sum(((2.0, inner), (1.0, Decoupled(K2()))))) == [
        Summand((ImportanceSampling(), OPSM(0.1)), 2.0),
        Summand((K2(), Proximal()), 1.0),
    ]
    normalized = ImportanceWeight("token", 2.0, 0.6, 1.5, normalize=True)
    both = Sum(((1.0, Product(M2PO(0.05), (normalized,))), (2.0, Decoupled(M2PO(0.05), (SecondMoment(0.01),)))))
    fixed, first = of_batch(both, tokens), tokens.sequence == 0
    assert torch.equal(gradient(fixed, take(tokens, first)), gradient(both, tokens)[first])
    assert not torch.equal(gradient(both, take(tokens, first)), gradient(both, tokens)[first])

    # r of pi to p, and of p to mu: inside both; outside the clip; outside the band; outside both.
    inside, clipped, cut = 0.0, 0.5, 1.0
    steps = [(x, y) for y in (inside, cut) for x in (inside, clipped)]
    moved = make_tokens([-1.0] * 4, [-1.0 - x - y for x, y in steps], [1.0] * 4)
    moved = dataclasses.replace(moved, proximal_logp=torch.tensor([-1.0 - x for x, _ in steps]).double())
    ratios = moved.logp - moved.behavior_logp
    for made, outside in (
        (Decoupled(PPOClip(0.2, 0.28), (band,)), [False, True, True, True]),
        (Decoupled(PPOClip(0.2, 0.28)), [False, True, False, True]),
        (Decoupled(Reinforce(), (OPSM(9.0), band)), [False, False, True, True]),
        (Product(Reinforce(), (band,)), (ratios > math.log(1.4)).tolist()),
        (Product(IcePop(0.1, 4.0), (Band(0.5, 2.0),)), (ratios > math.log(2)).tolist()),
        (Sum(((1.0, K2()), (1.0, IcePop(0.1, 2.0)))), (ratios > math.log(2)).tolist()),
        (of_batch(Product(Reinforce(), (normalized,)), moved), (ratios > math.log(1.5)).tolist()),
    ):
        assert made.out_of_region(moved).tolist() == outside, made
    for made in (Decoupled(Reinforce()), Decoupled(K2(), (ImportanceWeight(cap=2.0),)), Sum(((1.0, K2()),))):
        assert made.out_of_region(moved) is None
    for text in ("vespo(max_ratio=2.0)", "none*proximal"):
        with pytest.raises(InputError, match="proximal_logp is missing"):
            gradient(parse_spec(text, REGISTRY), dataclasses.replace(moved, proximal_logp=None))
    with pytest.raises(InputError, match="score is missing"):
        gradient(TOPR(), dataclasses.replace(moved, score=None))


def test_a_factor_is_a_number_in_the_losss_precision() -> None:
    tokens = random_tokens([3, 4])
    masks = Band(0.7, 1.4), Band(0.1, 3.0, "every"), Reject("seq_max_k2", 0.1), BinaryKL(0.1), OPSM(0.1), SecondMoment()
    for dtype, wanted in ((torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        for factor in (*masks, ImportanceWeight(cap=2.0), ImportanceWeight(cap=2.0, normalize=True)):
            assert factor.factor(cast(tokens, dtype)).dtype == wanted


def test_weights_are_rejected_and_normalised_as_printed() -> None:
    """A lower bound rejects without an upper one; the mean is over tokens, or over sequences of any length."""

    def weights(tokens: Tokens, *given: object) -> list[float]:
        return (-gradient(Product(Reinforce(), (ImportanceWeight(*given),)), tokens)).tolist()  # type: ignore[arg-type]

    assert ImportanceWeight("token", 2.0).out_of_region(probable(0.1, 0.5, 1.0)) is None
    assert weights(probable(0.1, 0.5, 1.0), "token", 2.0, 0.5) == [0.0]
    assert weights(probable(0.3, 0.5, 1.0), "token", 2.0, 0.5) == pytest.approx([0.6])
    tokens = make_tokens([-1.0] * 4, [-1.1] * 4, [1.0] * 4, sequence=[0, 1, 1, 1])
    one, three = math.exp(0.1), math.exp(0.3)
    wanted = [2 * w / (one + three) for w in (one, three, three, three)]
    assert weights(tokens, "sequence", 9.0, 0.0, None, True) == pytest.approx(wanted)
    uneven = make_tokens([-1.0] * 3, [-1.1, -1.1, -1.3], [1.0] * 3, sequence=[0, 0, 1])
    wanted = [3 * w / (2 * one + three) for w in (one, one, three)]
    assert weights(uneven, "token", 9.0, 0.0, None, True) == pytest.approx(wanted)


def test_statistics_of_a_sequence_are_of_its_kept_tokens() -> None:
    """One of one token, one of many, and one of none, whose mean is 0; in any order."""
    tokens = random_tokens([1, 3, 12, 2], masked=0.3)
    keep = torch.where(tokens.sequence == 0, True, tokens.keep & (tokens.sequence != 3))
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    mixed = take(dataclasses.replace(tokens, keep=keep, position=torch.arange(18)), order)
    sequences, x = Sequences.of(mixed), mixed.logp
    assert sequences.position is mixed.position
    for t, i in enumerate(mixed.sequence):
        kept = mixed.keep & (mixed.sequence == i)
        before = x[kept & (mixed.position < mixed.position[t])]
        assert sequences.count(x)[t] == kept.sum() and sequences.sum(x)[t].item() == pytest.approx(float(x[kept].sum()))
        assert sequences.mean(x)[t].item() == pytest.approx(float(x[kept].mean()) if kept.any() else 0.0)
        assert sequences.max(x)[t] == (x[kept].max() if kept.any() else -math.inf)
        assert sequences.before(x)[t].item() == pytest.approx(float(before.sum()))
    large = Sequences.of(make_tokens([-1.0] * 3, [-1.0] * 3, [1.0] * 3, sequence=[0, 1, 1]))
    assert large.before(torch.tensor([1e8, 1.0, 1.0])).tolist() == [0.0, 0.0, 1.0]  # whatever is before in the batch
    one = Sequences.of(make_tokens([-1.0] * 3, [-1.0] * 3, [1.0] * 3, sequence=[0, 0, 0]))
    assert one.sum(torch.tensor([1e8, 1.0, -1e8])).tolist() == [1.0] * 3  # float32 would lose the 1


def test_statistics_of_small_batches() -> None:
    """M2PO clips nothing within its budget though every token moves outward; one token stays in AReaL's; KL-Cov chooses
    one at least, and no masked one.
    """
    outward = make_tokens([-1.0, -1.1, -1.3], [-1.1, -1.3, -1.6], [1.0, 1.0, 1.0])
    assert (gradient(M2PO(0.06), outward) != 0).all()
    assert (gradient(M2POAReaL(1e-3), outward) != 0).tolist() == [True, False, False]
    assert (gradient(M2POAReaL(0.06), outward) != 0).all()
    at_threshold = make_tokens([-1.0, -1.0], [-1.0, -1.5], [1.0, 1.0])
    assert (gradient(M2POAReaL(0.125), at_threshold) != 0).tolist() == [True, False]
    nothing = take(outward, torch.tensor([], dtype=torch.long))
    for objective in (
        M2PO(),
        M2POAReaL(),
        ClipCov(),
        KLCov(),
        Product(Reinforce(), (ImportanceWeight(cap=2, normalize=True),)),
    ):
        assert gradient(objective, nothing).shape == (0,)
    few = make_tokens([-1.0, -2.0, -1.9], [-1.1, -2.1, -2.0], [1.0, -0.1, -0.1])
    plain = gradient(ImportanceSampling(), few)
    assert (gradient(KLCov(1e-6), few) != plain).tolist() == [True, False, False]
    for moved in (30.0, -30.0):  # capped at 20 nats either way
        far = make_tokens([-31.0 + max(moved, 0)], [-31.0 - min(moved, 0)], [1.0])
        pulled, free = (objective(far).loss.item() for objective in (KLCov(1.0, 0.5), ImportanceSampling()))
        assert pulled - free == pytest.approx(0.5 * 20, rel=1e-6 if moved > 0 else 1e-12)
    masked = random_tokens([9, 9], masked=0.5)
    apart = gradient(KLCov(1.0), masked) - gradient(ImportanceSampling(), masked)
    assert torch.equal(apart.abs() > 0.5, masked.keep)


def test_m2pos_budget_at_its_edges() -> None:
    """A mean at the budget clips nothing, a winsorised one at it is beyond; a token that has not moved counts nowhere,
    one that the sampler could not draw has moved without bound.
    """
    at_budget = make_tokens([-1.0, -1.0], [-1.5, -3.0], [1.0, 1.0])  # squares 0.25 and 4
    assert M2PO(0.25)(at_budget).loss.tolist() == [-1.0, -1.0]
    assert gradient(M2PO(0.25), take(at_budget, torch.tensor([0]))).item() == -math.exp(0.5)
    unmoved = make_tokens([-1.0, -1.0], [-1.0, -1.3], [1.0, 1.0])
    assert gradient(M2PO(0.05), unmoved).tolist() == [-1.0, 0.0]
    assert gradient(M2PO(0.05, floor_high=0.5), unmoved)[1].item() == pytest.approx(-math.exp(0.3))
    fallen = make_tokens([-1.3], [-1.0], [-1.0])
    assert gradient(M2PO(0.05, floor_low=0.5), fallen).item() == pytest.approx(math.exp(-0.3))
    never = make_tokens([-1.0, -1.0], [-1.1, -math.inf], [1.0, 1.0], dtype=torch.float32)
    for tokens, a in (
        (never, 1.0),
        (dataclasses.replace(never, logp=never.behavior_logp, behavior_logp=never.logp), -1.0),
    ):
        tokens = dataclasses.replace(tokens, advantage=a * tokens.advantage)
        assert gradient(M2PO(), tokens).tolist() == [0.0, 0.0]
        assert M2PO()(tokens).loss.tolist() == pytest.approx([-a * math.exp(0.1 * a)] * 2)


@pytest.mark.parametrize(
    "text",
    [
        *("ppo(0.0, 0.0, 1.1, 0.1)", "ppo(1.0, 0.1)", "gspo(0.0, 0.0)", "gspo(1.0, 0.1)", "penalty('k3', 0.0)"),
        *("dppo(0.1, 0.1, 'tv', 0.1)", "mask(0.1)", "ipo(0.1, 0.1)", "icepop(0.0, 0.1)", "kpop(0.1)", "topr(0.1, 0.1)"),
        *("cppo(0.1, 0.1, 0.1, 1, 0.1)", "cppo(0.1, 1.0)", "vespo(0.1, 0.1, 0.1, 0.1, 0.1)", "gmpo(0.0, 0.0)"),
        *(
            "drpo_eff(0.1, 'power', 'log_ratio', 0.0, 1.1, 0.1, 0.1, 0.1, 0.1)",
            "m2po(0.1, 1.0, 0.0)",
            "kl_cov(1.0, 0.1)",
        ),
        *(
            "clip_cov(0.0, 0.0, 0.1, -9.0, -8.0)",
            "clip_cov(1.0, 0.1, 1.0)",
            "m2po_areal(0.1)",
            "none*second_moment(0.1)",
        ),
        *("none*band(0.0, 0.1)", "none*reject('token_k1', 0.1, 0.0)", "none*binary_kl(0.1)", "none*opsm(0.1)"),
        *("reinforce*weight('token', 0.1)", "reinforce*weight('token', None, 0.0, 0.1)", "0.1*none"),
        *(
            "reinforce*weight('token', 0.1, 0.0, None, False, 0.1)",
            "reinforce*weight('token', None, 0.0, 0.1, False, 2.0)",
        ),
    ],
)
def test_the_ends_of_every_range_are_allowed(text: str) -> None:
    objective = parse_spec(text, REGISTRY)
    assert parse_spec(format_spec(objective, REGISTRY), REGISTRY) == objective


@each_objective
def test_objective_is_a_frozen_value(objective: Objective) -> None:
    again = copy.deepcopy(objective)
    assert again == objective
    assert hash(again) == hash(objective)
    assert len({again, objective}) == 1
    assert eval(repr(objective)) == objective
    assert isinstance(objective, Objective)
    assert isinstance(objective.needs, frozenset)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.delta = 1.0  # type: ignore[misc]
    assert sum(objective == c.objective for c in CASES) == 1


@each_objective
def test_tokenwise_is_whether_a_token_depends_on_its_sequence(objective: Objective) -> None:
    """Given the statistics of the batch, where the objective reads any; a mask may need a large move to change."""
    alone = []
    near = make_tokens([math.log(0.5), math.log(0.55)], [math.log(0.5)] * 2, [1.0, 1.0], sequence=[0, 0])
    for tokens, step in itertools.product((random_tokens([6], masked=0.0), near), (0.1, -0.03, 1.0, 5.0)):
        fixed = of_batch(objective, tokens)
        moved = dataclasses.replace(tokens, logp=tokens.logp.clone())
        moved.logp[0] -= step
        alone.append(torch.equal(gradient(fixed, tokens)[1:], gradient(fixed, moved)[1:]))
    assert objective.tokenwise == all(alone)
