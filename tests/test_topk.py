"""Top-K divergences: the formulas, the operator that makes them, what the sampler reports, and both ends together.

The truth is an enumeration of all tokens in float64. How objectives act on the divergence is in test_objectives.py's
table. Not covered: GPUs, and engines other than transformers'.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from drpo import objectives
from drpo.batch import BatchConfig, pack
from drpo.errors import InputError
from drpo.model import loading
from drpo.model.policy import Policy
from drpo.model.precision import Precision
from drpo.objectives import DPPO, DRPO, GSPO, TOPK, Objective, gradient, needed_divergence, topk_kl, topk_tv, total
from drpo.ops import Head, chunk_logits, chunked, linear_divergence, linear_logprob
from drpo.reductions import Horizon
from drpo.rollout import ScriptedEngine
from drpo.rollout.engine import generation
from drpo.rollout.sample import draw, top_logprobs
from drpo.spec import format_spec, parse_spec
from drpo.train.auxiliary import AuxiliaryLosses
from drpo.train.config import Run, configure, flat_json, from_json, to_json
from drpo.train.divergence import exact_divergence
from drpo.train.loop import train
from drpo.train.metrics import token_metrics
from drpo.train.optim import AdamW
from drpo.train.records import METRICS, read_records
from drpo.train.setup import build
from drpo.train.step import update_policy
from drpo.types import Episode, Request, Sampling, TokenLoss, Tokens, TopK
from support.architectures import FAMILIES
from support.grids import each_pair
from support.head import CHUNKS, HEAD, TEMPERATURES, Largest, fused, inputs, logits_at_once
from support.rollouts import Prompted, transformers_engine, with_engine
from support.tiny_world import PROBLEMS, STOPS, batched, distribution, grouped, perturb, tiny, with_sequence
from support.worlds import sampling as smoke_sampling
from support.worlds import tiny_run

KINDS = tuple(TOPK)


def merged(logp: Tensor, behavior_logp: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The truth: both distributions [T, V] with all but `ids` [T, K] merged, then the textbook's formulas."""
    p, q = behavior_logp.double().exp(), logp.double().exp()
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, ids, False)
    p, q = (torch.cat([x.gather(1, ids), (x * others).sum(1, keepdim=True)], 1) for x in (p, q))
    return {"topk_tv": (p - q).abs().sum(1) / 2, "topk_kl": torch.special.xlogy(p, p / q).nan_to_num(0.0).sum(1)}


def top_of(behavior_logp: Tensor, k: int) -> TopK:
    logp, ids = behavior_logp.topk(k)
    return TopK(ids, logp)


def distributions(
    seed: int, vocab_size: int, spread: float, gap: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The policy's and the sampler's log-probabilities, [16, vocab_size]: from flat to peaked, from near to far."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 16, vocab_size, generator=generator, dtype=torch.float64)
    sampler, policy = (x.log_softmax(-1).to(dtype) for x in (spread * one, spread * one + gap * other))
    return policy, sampler


any_distributions = st.builds(
    distributions,
    st.integers(0, 2**20),
    vocab_size=st.integers(2, 40),
    spread=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    gap=st.sampled_from([1e-6, 0.01, 0.5, 2.0]),
)


# ---- the formulas ----


GOLDEN = json.loads((Path(__file__).parent / "golden" / "topk.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", GOLDEN, ids=lambda data: str(data["seed"]))
def test_golden_vectors(data: dict, dtype: torch.dtype) -> None:
    """What the authors' program makes of whole logits: their own choice of the K is part of it."""
    logp, behavior_logp = (
        torch.tensor(data[name], dtype=dtype).log_softmax(-1) for name in ("current_logits", "behavior_logits")
    )
    top = top_of(behavior_logp, data["k"])
    for name, function in (("tv", topk_tv), ("kl", topk_kl)):
        found = function(logp.gather(1, top.ids), top.logp)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), torch.tensor(data[name]).double(), rtol=0, atol=1e-5)


@given(any_distributions, st.data())
def test_divergences_are_those_of_the_merged_distributions(both: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    logp, behavior_logp = both
    top = top_of(behavior_logp, data.draw(st.integers(1, logp.shape[1])))
    truth = merged(logp, behavior_logp, top.ids)
    for kind, function in TOPK.items():
        found = function(logp.gather(1, top.ids), top.logp)
        torch.testing.assert_close(found, truth[kind], rtol=1e-9, atol=1e-12, msg=lambda m, kind=kind: f"{kind}: {m}")


@given(any_distributions)
def test_all_words_make_the_exact_divergences(both: tuple[Tensor, Tensor]) -> None:
    """K = V, in any order: no rest is left, and what rounding makes of it must not show."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        logp, behavior_logp = (x.to(dtype) for x in both)
        p, q = (x.double().exp() for x in (behavior_logp, logp))
        order = torch.randperm(p.shape[1], generator=torch.Generator().manual_seed(0))
        tv = (p - q).abs().sum(1) / 2
        kl = (p * (behavior_logp.double() - logp.double())).sum(1)
        found_tv, found_kl = topk_tv(logp[:, order], behavior_logp[:, order]), topk_kl(logp, behavior_logp)
        torch.testing.assert_close(found_tv.double(), tv, rtol=1e-6, atol=tolerance)
        torch.testing.assert_close(found_kl.double(), kl, rtol=1e-6, atol=tolerance)


@given(any_distributions)
def test_fewer_words_never_see_more(both: tuple[Tensor, Tensor]) -> None:
    """Merging outcomes adds to no divergence; and Pinsker's inequality ties the two."""
    logp, behavior_logp = both
    for kind, function in TOPK.items():
        seen = []
        for k in range(1, logp.shape[1] + 1):
            top = top_of(behavior_logp, k)
            seen.append(function(logp.gather(1, top.ids), top.logp))
        assert (seen[0] >= 0).all()
        assert all((few <= more * (1 + 1e-12) + 1e-13).all() for few, more in pairwise(seen)), kind
    tv, kl = (f(logp, behavior_logp) for f in (topk_tv, topk_kl))
    assert (tv <= 1).all()
    assert (2 * tv**2 <= kl * (1 + 1e-9) + 1e-12).all()


@given(any_distributions, st.data())
def test_equal_distributions_are_not_apart(both: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, both[0].shape[1]))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logp = top_of(both[0].to(dtype), k).logp
        for function in TOPK.values():
            assert not function(logp, logp).any()


def test_kl_runs_from_the_sampler_to_the_policy() -> None:
    p, q = (torch.tensor([[x]], dtype=torch.float64).log() for x in (0.9, 0.5))
    assert topk_kl(q, p).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert topk_kl(p, q).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5))


@pytest.mark.parametrize("left", [1e-3, 1e-6, 1e-12])
def test_a_rest_next_to_nothing_keeps_its_digits(left: float) -> None:
    """The policy has its most probable at 1 - 2 left and another at left: 1 minus their sum has 4 digits at 1e-12."""
    behavior_logp = torch.tensor([[0.8, 0.1]], dtype=torch.float64).log()
    logp = torch.tensor([[math.log1p(-2 * left), math.log(left)]], dtype=torch.float64)
    want = 0.8 * (math.log(0.8) - math.log1p(-2 * left)) + 0.2 * (math.log(0.1) - math.log(left))
    assert topk_kl(logp, behavior_logp).item() == pytest.approx(want, rel=1e-9)
    assert topk_tv(logp, behavior_logp).item() == pytest.approx(0.2 - 2 * left)


@pytest.mark.parametrize("noise", [0.0, 3e-7, -3e-7, 1e-9])
def test_rounding_makes_no_divergence(noise: float) -> None:
    """Everything is listed, and one side adds up to a little more or less than 1; their difference has no logarithm."""
    behavior_logp = torch.tensor([[0.7, 0.2, 0.1]]).log()
    logp = behavior_logp + noise
    assert abs(topk_kl(logp, behavior_logp).item()) < 3e-6
    assert abs(topk_tv(logp, behavior_logp).item()) < 1e-6


def test_a_total_variation_is_at_most_1() -> None:
    """Of distributions nearly without a common word, whose rounded differences would sum to more now and then."""
    make = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.log_softmax(30 * torch.randn(100_000, 3, generator=make).double(), -1) for _ in range(2))
    assert ((log_p.exp() - log_q.exp()).abs().sum(-1) / 2).max() > 1
    assert topk_tv(log_q, log_p).max() == 1


def test_impossible_tokens() -> None:
    """-inf is a probability of 0: nothing where both say so, all of it in KL where the sampler alone may draw it."""
    p = torch.tensor([[0.75, 0.25, 0.0]]).log()
    q = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert topk_tv(p, p).item() == topk_kl(p, p).item() == 0
    assert topk_tv(q, p).item() == topk_tv(p, q).item() == pytest.approx(0.25)
    assert topk_kl(q, p).item() == pytest.approx(0.75 * math.log(1.5), abs=1e-6)
    assert topk_kl(p, q).item() == math.inf
    nothing = torch.full((1, 2), -torch.inf)
    assert topk_tv(nothing, nothing).item() == topk_kl(nothing, nothing).item() == 0
    assert topk_tv(torch.tensor([[0.0, -torch.inf]]), nothing).item() == 1


def test_any_leading_shape() -> None:
    logp, behavior_logp = distributions(0, 5, 1.0, 0.5)
    for function in TOPK.values():
        whole = function(logp.view(4, 4, 5), behavior_logp.view(4, 4, 5))
        assert torch.equal(whole.view(16), function(logp, behavior_logp))


# ---- the mask ----


def one_token(pi: float, mu: float, advantage: float, divergence: float | None) -> Tokens:
    l, m, a = (torch.tensor([x], dtype=torch.float64) for x in (math.log(pi), math.log(mu), advantage))
    column = None if divergence is None else torch.tensor([divergence])
    return Tokens(l, m, a, torch.tensor([True]), torch.tensor([0]), column)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("divergence", [0.05, 0.5])
@pytest.mark.parametrize(("pi", "mu"), [(0.3, 0.2), (0.2, 0.3), (0.25, 0.25)])
def test_a_token_is_dropped_where_the_distribution_is_far_and_it_went_the_advantages_way(
    kind: str, advantage: float, divergence: float, pi: float, mu: float
) -> None:
    objective = DPPO(0.15, divergence=kind)
    away = (pi > mu) if advantage > 0 else (pi < mu)
    slope = gradient(objective, one_token(pi, mu, advantage, divergence)).item()
    assert slope == (0 if away and divergence > 0.15 else pytest.approx(-advantage * pi / mu))


def test_each_side_has_its_own_radius() -> None:
    objective = DPPO(0.1, 0.3, divergence="topk_tv")
    assert gradient(objective, one_token(0.3, 0.2, 1.0, 0.2)).item() != 0
    assert gradient(objective, one_token(0.2, 0.3, -1.0, 0.2)).item() == 0


@pytest.mark.parametrize("kind", ["tv", "kl", *KINDS])
def test_what_an_objective_needs(kind: str) -> None:
    objective = DPPO(0.15, divergence=kind)
    assert objective.needs == (frozenset({kind}) if kind in KINDS else frozenset())
    assert parse_spec(format_spec(objective, objectives.REGISTRY), objectives.REGISTRY) == objective
    assert objectives.vanishes_at_zero_advantage(objective)
    if kind in KINDS:
        with pytest.raises(InputError, match=r"tokens\.divergence is missing.*top_logprobs") as caught:
            objective(one_token(0.3, 0.2, 1.0, None))
        assert "\n" not in str(caught.value)


def test_needs_that_nothing_fills_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'topk_tv'"):
        needed_divergence({"topk_t"})
    with pytest.raises(InputError, match="there is one"):
        needed_divergence(set(KINDS))


# ---- the operator ----

T, V = 23, 37


@dataclass(frozen=True)
class Whole:
    """Not token-wise, and reads a divergence: each token's loss is scaled by its sequence's largest."""

    tokenwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"topk_kl"})

    def __call__(self, tokens: Tokens) -> TokenLoss:
        assert tokens.divergence is not None
        largest = tokens.divergence.new_zeros(len(tokens.keep)).scatter_reduce(
            0, tokens.sequence, torch.where(tokens.keep, tokens.divergence, 0), "amax"
        )
        return TokenLoss(-tokens.advantage * largest[tokens.sequence].detach() * tokens.logp)


READERS: dict[str, Objective] = {
    "topk_tv": DPPO(0.15, divergence="topk_tv"),
    "topk_kl": DPPO(0.05, 0.1, divergence="topk_kl"),
    "not token-wise": Whole(),
}


def columns(t: int = T) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(t, generator=generator) > 0.3
    return {
        "behavior_logp": -3 * torch.rand(t, generator=generator, dtype=torch.float64) - 0.01,
        "advantage": torch.randn(t, generator=generator, dtype=torch.float64),
        "keep": keep,
        "sequence": torch.arange(t) // 4,
        "token_weight": torch.rand(t, generator=generator, dtype=torch.float64) + 0.5,
    }


def sampler_of(hidden: Tensor, weight: Tensor, k: int, temperature: float = 1.0, gap: float = 0.3) -> TopK:
    """The K most probable under a distribution near softmax(hidden weight^T / temperature)."""
    generator = torch.Generator().manual_seed(2)
    moved = hidden.double() + gap * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    return top_of((moved @ weight.double().T / temperature).log_softmax(-1), k)


def whole_distribution(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden.double() @ weight.double().T / temperature).log_softmax(-1)


DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


@each_pair("dtype, k, temperature", [*DTYPES], [1, 3, V], TEMPERATURES)
def test_log_probabilities_at_the_ids_are_the_distributions(dtype: torch.dtype, k: int, temperature: float) -> None:
    hidden, weight, target = inputs(T, V, dtype)
    ids = sampler_of(hidden, weight, k, temperature).ids
    wanted = whole_distribution(hidden, weight, temperature).gather(1, ids)
    for chunk in CHUNKS:
        auxiliary = chunk_logits.AuxiliaryOutputs(ids, k, lambda _, logp: logp)
        head = Head(weight)
        logp, _, at = chunked.linear_logprob(hidden, head, target, temperature, chunk=chunk, auxiliary=auxiliary)
        assert at is not None
        assert at.dtype == torch.promote_types(dtype, torch.float32)
        assert (at <= 0).all()
        torch.testing.assert_close(at.double(), wanted, rtol=0, atol=DTYPES[dtype])
        hit = ids == target[:, None]
        assert torch.equal(at[hit], logp[:, None].expand_as(at)[hit])  # one token has one log-probability
        if k == V:
            torch.testing.assert_close(at.exp().sum(1), torch.ones_like(logp), rtol=0, atol=1e-5)


@each_pair("dtype, k, temperature", [torch.float64, torch.float32], [1, 4, V], TEMPERATURES)
def test_divergences_of_the_operator_are_the_enumerations(dtype: torch.dtype, k: int, temperature: float) -> None:
    hidden, weight, target = inputs(T, V, dtype)
    generator = torch.Generator().manual_seed(3)
    other = hidden + 0.3 * torch.randn(hidden.shape, generator=generator).to(dtype)
    behavior_logp = whole_distribution(other, weight, temperature)
    top = top_of(behavior_logp, k)
    true_logp = whole_distribution(hidden, weight, temperature)
    truth = merged(true_logp, behavior_logp, top.ids)
    plain = linear_logprob(hidden, Head(weight), target, temperature)
    for chunk in CHUNKS:
        *both, found = linear_divergence(hidden, Head(weight), target, top, KINDS, temperature, chunk=chunk)
        for one, alone in zip(both, plain, strict=True):
            torch.testing.assert_close(one, alone, rtol=1e-6, atol=1e-6)
        assert set(found) == set(KINDS)
        rest_p, rest_q = (1 - x.exp().gather(1, top.ids).sum(1) for x in (behavior_logp, true_logp))
        for kind in KINDS:
            each = (
                8 * torch.finfo(dtype).eps
            )  # of a probability; a rest may be smaller, and its logarithm feels it more
            budget = 40 * each + (each * rest_p / rest_q if kind == "topk_kl" and k < V else 0)
            assert ((found[kind].double() - truth[kind]).abs() <= budget).all(), (kind, chunk)


def test_rounded_logits_make_no_divergence_of_their_own() -> None:
    """Logits near 20 round by up to 0.06 in bfloat16, which would move the most probable word's probability by as much.

    The candidates are had in full, and the normaliser with them, so that the rest cannot fall below 0 either.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, HEAD, generator=generator).to(torch.bfloat16)
    weight = (5 * torch.randn(515, HEAD, generator=generator)).to(torch.bfloat16)
    target = torch.randint(515, (200,), generator=generator)
    top = top_of(whole_distribution(hidden, weight, 1.0), 20)
    _, _, found = linear_divergence(hidden, Head(weight), target, top)
    rounded = top_of((hidden @ weight.T).float().log_softmax(-1), 515)
    naive = topk_kl(torch.zeros(200, 515).scatter(1, rounded.ids, rounded.logp).gather(1, top.ids), top.logp)
    assert naive.max() > 1e-3
    assert found["topk_kl"].max() < 1e-4
    assert found["topk_tv"].max() < 5e-3


def plain_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, objective: Objective, behavior: Tensor, k: int, temperature: float
) -> Tensor:
    """The usual way, with all logits, and autograd going through them."""
    logp, _ = logits_at_once(hidden, weight, target, temperature)
    divergence = merged(whole_distribution(hidden, weight, temperature).detach(), behavior, top_of(behavior, k).ids)
    given = columns()
    tokens = Tokens(
        logp,
        given["behavior_logp"],
        given["advantage"],
        given["keep"],
        given["sequence"],
        divergence[min(objective.needs)],
    )
    return total(objective, tokens, given["token_weight"])


@each_pair("tied, name, temperature, k", [False, True], [*READERS], [0.6, 1.5], [3, V])
def test_the_loss_is_the_plain_one(name: str, temperature: float, k: int, tied: bool) -> None:
    """Value and both gradients: the divergence decides who is trained, and has no gradient itself."""
    _, weight, target = inputs(T, V, torch.float64)
    ids = torch.arange(T) * 7 % V
    base = inputs(T, V, torch.float64)[0]
    behavior = whole_distribution((base + torch.tanh(weight[ids]) if tied else base) + 0.2, weight, temperature)
    objective, results = READERS[name], []
    for chunk in ("plain", *CHUNKS):
        w, h = weight.clone().requires_grad_(), base.clone().requires_grad_()
        hidden = h + torch.tanh(w[ids]) if tied else h
        if chunk == "plain":
            loss = plain_loss(hidden, w, target, objective, behavior, k, temperature)
        else:
            given = columns() | {"top_logprobs": top_of(behavior, k)}
            result = fused(hidden, w, target, objective, **given, temperature=temperature, chunk=chunk)
            loss, divergence = result.loss, result.divergence
            assert divergence is not None
            truth = merged(whole_distribution(hidden, w, temperature).detach(), behavior, top_of(behavior, k).ids)
            assert not divergence.requires_grad
            kept = torch.where(given["keep"], truth[min(objective.needs)], 0)
            torch.testing.assert_close(divergence, kept, rtol=1e-9, atol=1e-12)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    assert results[0][1].any()
    free = plain_loss(base, weight, target, DPPO(1e9, divergence="topk_tv"), behavior, k, temperature)
    assert name == "not token-wise" or tied or float(free) != pytest.approx(float(results[0][0]))  # someone is dropped
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", READERS)
def test_what_is_left_out_is_as_good_as_gone(name: str) -> None:
    hidden, weight, target = inputs(T, V, torch.float32)
    given, top = columns(), sampler_of(hidden, weight, 4)
    given = {n: c.float() if c.is_floating_point() else c for n, c in given.items()}
    keep = given["keep"]
    found = fused(hidden, weight, target, READERS[name], **given, top_logprobs=top)
    removed = {n: c[keep] for n, c in given.items()}
    alone = fused(hidden[keep], weight, target[keep], READERS[name], **removed, top_logprobs=top.at(keep))
    assert found.divergence is not None
    assert alone.divergence is not None
    assert torch.equal(found.loss, alone.loss)
    assert torch.equal(found.logp[keep], alone.logp)
    assert torch.equal(found.divergence[keep], alone.divergence)
    poisoned = TopK(top.ids, torch.where(keep[:, None], top.logp, torch.nan))
    again = fused(hidden, weight, target, READERS[name], **given, top_logprobs=poisoned)
    assert torch.equal(again.loss, found.loss)


def products(objective: Objective, top: TopK | None) -> float:
    hidden, weight, target = inputs(T, V, torch.float32)
    given = columns() | {"keep": torch.ones(T, dtype=torch.bool)}
    with FlopCounterMode(display=False) as counter:
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        fused(*leaves, target, objective, **given, top_logprobs=top, chunk=5).loss.backward()
    return counter.get_total_flops() / (2 * T * HEAD * V)


def test_no_second_product_over_the_vocabulary() -> None:
    hidden, weight, _ = inputs(T, V, torch.float32)
    top = sampler_of(hidden, weight, 4)
    assert products(READERS["topk_tv"], top) == products(DRPO(0.2), None) == 3
    assert products(READERS["not token-wise"], top) == products(GSPO(), None) == 4


class LargestMade(Largest):
    """As `Largest`, of what is not a view of the sampler's report, which may be as large as the logits."""

    def __init__(self, top: TopK) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in (top.ids, top.logp)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = self.numel
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() in self.given:
            self.numel = before
        return result


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("topk_tv", torch.float32),
        ("topk_kl", torch.bfloat16),
        ("not token-wise", torch.bfloat16),
        pytest.param("topk_tv", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("topk_kl", torch.float32, marks=pytest.mark.slow),
        pytest.param("not token-wise", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_never_holds_the_logits_even_where_all_words_are_asked_for(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, v = 180, 515
    hidden, weight, target = inputs(t, v, dtype)
    monkeypatch.setattr(chunk_logits, "CHUNK_BYTES", {"cpu": 8 * v * dtype.itemsize})
    monkeypatch.setattr(chunk_logits, "GATHERED", 8 * v)
    for k in (20, v):
        top = sampler_of(hidden, weight, k)
        allowed = max(v * HEAD, t * HEAD, 8 * (v + 1), t * 20)
        assert allowed < t * v / 10
        given = columns(t) | {"keep": torch.ones(t, dtype=torch.bool)}
        with LargestMade(top) as seen:
            fused(hidden.requires_grad_(), weight, target, READERS[name], **given, top_logprobs=top)
        assert seen.numel <= allowed, k


@pytest.mark.parametrize("shape", [(T - 1, 4), (T,), (T, 0), (T, 4, 1)])
def test_shapes_of_top_are_checked(shape: tuple[int, ...]) -> None:
    hidden, weight, target = inputs(T, V, torch.float32)
    top = TopK(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
    with pytest.raises(InputError, match=r"tokens\.top_logprobs\.ids .* do not fit \[T, K\]") as caught:
        fused(hidden, weight, target, READERS["topk_tv"], **columns(), top_logprobs=top)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="linear_divergence: top"):
        linear_divergence(hidden, Head(weight), target, top)
    fine = TopK(torch.zeros(T, 4, dtype=torch.int64), torch.zeros(T, 5))
    with pytest.raises(InputError, match="do not fit"):
        linear_divergence(hidden, Head(weight), target, fine)


def test_what_is_missing_or_unknown_is_named() -> None:
    hidden, weight, target = inputs(T, V, torch.float32)
    with pytest.raises(InputError, match=r"needs 'topk_tv', but tokens\.top_logprobs is missing"):
        fused(hidden, weight, target, READERS["topk_tv"], **columns())
    with pytest.raises(InputError, match="did you mean 'topk_kl'"):
        linear_divergence(hidden, Head(weight), target, sampler_of(hidden, weight, 2), ["topk_k"])
    with pytest.raises(InputError, match="kinds is empty"):
        linear_divergence(hidden, Head(weight), target, sampler_of(hidden, weight, 2), [])


# ---- what the sampler reports ----


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_most_probable_are_the_distributions(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (4 * torch.randn(9, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    monkeypatch.setattr("drpo.rollout.sample.CHUNK_ELEMENTS", 700)  # in parts
    asked = Sampling(temperature=temperature, top_logprobs=7)
    top = top_logprobs(logits, asked)
    wanted = (logits.double() / (temperature or 1)).log_softmax(-1)
    assert top.ids.shape == top.logp.shape == (9, 7)
    assert (top.logp.dtype, top.ids.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(top.logp.double(), wanted.topk(7).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(top.logp.double(), wanted.gather(1, top.ids), rtol=0, atol=1e-5)
    assert all(len(set(row)) == 7 for row in top.ids.tolist())
    u = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    everything = top_logprobs(logits, replace(asked, top_logprobs=300))
    token, logp = draw(logits, u, asked)
    same = everything.logp[everything.ids == token[:, None]]
    torch.testing.assert_close(same, logp, rtol=1e-6, atol=1e-6)


def test_tiny_probabilities_stay_finite() -> None:
    top = top_logprobs(torch.tensor([[0.0, -200.0, -300.0]]), Sampling(top_logprobs=3))
    assert top.logp.tolist() == [[0.0, -200.0, -300.0]]


@pytest.mark.parametrize(("top_k", "top_p", "left"), [(2, 1.0, 2), (0, 0.6, 2), (0, 1.0, 4)])
def test_truncation_rules_words_out(top_k: int, top_p: float, left: int) -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    top = top_logprobs(p.log(), Sampling(top_k=top_k, top_p=top_p, top_logprobs=4))
    assert top.ids[0, :left].tolist() == [1, 3, 2, 0][:left]
    kept = p[0, top.ids[0, :left]]
    torch.testing.assert_close(top.logp[0, :left].exp(), kept / kept.sum())
    assert top.logp[0, left:].tolist() == [-math.inf] * (4 - left)


@cache
def sampled(k: int, *, temperature: float = 1.0, max_rows: int | None = None) -> tuple[Episode, ...]:
    asked = Sampling(samples=4, max_new_tokens=12, temperature=temperature, top_logprobs=k)
    options = {} if max_rows is None else {"max_rows": max_rows}
    return tuple(transformers_engine(*tiny(STOPS), **options).generate(PROBLEMS, asked, (0,)))


def test_neighbours_do_not_matter() -> None:
    for one, other in zip(sampled(5), sampled(5, max_rows=4), strict=True):
        assert one.sequence.top_logprobs is not None
        assert other.sequence.top_logprobs is not None
        torch.testing.assert_close(one.sequence.top_logprobs.logp, other.sequence.top_logprobs.logp, rtol=0, atol=1e-5)


FOUND = TopK(torch.tensor([[41, 7], [42, 8], [7, 43]]), torch.tensor([[-0.5, -1.0], [-0.2, -3.0], [-0.6, -torch.inf]]))


@pytest.mark.parametrize(
    ("top", "said"),
    [
        (TopK(FOUND.ids[:2], FOUND.logp[:2]), r"ids \[2, 2\]: must be \[3, 2\]"),
        (TopK(FOUND.ids[:, :1], FOUND.logp[:, :1]), r"ids \[3, 1\]: must be \[3, 2\]"),
        (TopK(FOUND.ids, FOUND.logp[:, :1]), r"logp \[3, 1\]: must be \[3, 2\]"),
        (TopK(FOUND.ids, FOUND.logp.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(torch.nan))), "nan"),
        (TopK(FOUND.ids, FOUND.logp.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(0.1))), r"\[2, 1\]=0.1"),
    ],
)
def test_a_completion_refuses_a_broken_report(top: TopK, said: str) -> None:
    asked = Sampling(top_logprobs=2)
    request = Request(torch.tensor([1]), asked, frozenset(), (0, "q7", 3), "completion 3 of problem 'q7'")
    token_ids, logp = torch.tensor([41, 42, 43]), torch.full((3,), -0.5)
    assert generation(request, token_ids, logp, "length", 0, FOUND).top_logprobs is FOUND
    with pytest.raises(InputError, match=r"completion 3 of problem 'q7': top.*" + said) as caught:
        generation(request, token_ids, logp, "length", 0, top)
    assert "\n" not in str(caught.value)


def test_a_scripted_engine_reports_a_distribution() -> None:
    model, tokenizer = tiny()
    engine = ScriptedEngine(tokenizer, lambda r: "12")
    vocab_size = len(tokenizer)
    for k in (1, 3, vocab_size):
        (c,) = Prompted(engine, model).generate(PROBLEMS[:1], Sampling(samples=1, top_logprobs=k), ())
        assert c.sequence.top_logprobs is not None
        assert c.sequence.top_logprobs.ids[:, 0].tolist() == c.sequence.token_ids.tolist()
        assert torch.equal(c.sequence.top_logprobs.logp[:, 0], c.sequence.behavior_logp)
        assert all(len(set(row)) == k for row in c.sequence.top_logprobs.ids.tolist())
        assert (c.sequence.top_logprobs.logp.diff() <= 0).all()
    torch.testing.assert_close(c.sequence.top_logprobs.logp.exp().sum(1), torch.ones(3))
    engine.logp = 0.0
    (sure,) = Prompted(engine, model).generate(PROBLEMS[:1], Sampling(samples=1, top_logprobs=2), ())
    assert sure.sequence.top_logprobs is not None
    assert sure.sequence.top_logprobs.logp.tolist() == [[0.0, -math.inf]] * 3


# ---- from the sampler to the policy ----

REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.5, 0.0, 0.0), (0.0, 1.0, 0.5, 0.5), (1.0, 0.0, 1.0, 1.0))


def batch_config(budget: int = 200) -> BatchConfig:
    return BatchConfig(1, Horizon(20), budget, skip_zero_advantage=False)


def policy(gap: float = 0.0, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Policy:
    model = tiny(STOPS)[0]
    return Policy(perturb(model, gap) if gap else model, precision=Precision(dtype), temperature=temperature)


def enumerated(moved: Policy, completions: Sequence[Episode], temperature: float) -> dict[str, Tensor]:
    """[tokens] of each kind, by two whole distributions at every token."""
    fresh = tiny(STOPS)[0]
    found = [
        merged(
            distribution(moved.model, c, temperature), distribution(fresh, c, temperature), c.sequence.top_logprobs.ids
        )  # type: ignore[union-attr]
        for c in completions
    ]
    return {kind: torch.cat([f[kind] for f in found]) for kind in KINDS}


def stats_of(
    moved: Policy,
    completions: Sequence[Episode],
    objective: Objective,
    budget: int,
    terms: AuxiliaryLosses | None = None,
):
    (batch,) = batched(grouped(completions, REWARDS), batch_config(budget))
    still = torch.optim.SGD(moved.trainable().values(), lr=0.0)
    stats = update_policy(moved, still, batch, objective, 0.0, 1e30, terms)
    order = torch.argsort(torch.cat([m.sequence for m in batch.micro_batches]), stable=True)
    assert stats.tokens.divergence is not None
    return stats, stats.tokens.divergence[order], {n: p.grad.clone() for n, p in moved.trainable().items()}


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("topk_tv", 1.0),
        ("topk_kl", 0.6),
        pytest.param("topk_tv", 0.6, marks=pytest.mark.slow),
        pytest.param("topk_kl", 1.0, marks=pytest.mark.slow),
    ],
)
def test_fresh_weights_have_not_moved_and_moved_ones_have_by_so_much(kind: str, temperature: float) -> None:
    completions = sampled(6, temperature=temperature)
    objective = DPPO(0.15, divergence=kind)
    _, found, _ = stats_of(policy(temperature=temperature), completions, objective, 200)
    assert found.max() < 1e-5
    moved = policy(0.05, temperature)
    stats, found, _ = stats_of(moved, completions, objective, 200)
    wanted = enumerated(moved, completions, temperature)[kind]
    assert wanted.mean() > 0.01
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-3, atol=1e-5)
    figures = token_metrics(objective, stats.token_stats)
    assert figures["divergence_mean"] == pytest.approx(float(wanted.mean()), rel=1e-3)
    assert figures["divergence_p99"] == pytest.approx(float(wanted.double().quantile(0.99)), rel=1e-3)
    assert figures["out_of_region"] == pytest.approx(float((wanted > 0.15).double().mean()), abs=0.02)


@pytest.mark.parametrize("kind", ["topk_kl", pytest.param("topk_tv", marks=pytest.mark.slow)])
def test_any_micro_batches_and_additive_terms_see_the_same(kind: str) -> None:
    completions, objective = sampled(6), DPPO(0.05, divergence=kind)
    _, wanted, slopes = stats_of(policy(0.05), completions, objective, 10_000)
    nothing = AuxiliaryLosses(None, 0.0, 0.0)
    for budget, terms in ((60, None), (1, None), (200, nothing)):
        _, found, other = stats_of(policy(0.05), completions, objective, budget, terms)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-6)
        for name, slope in slopes.items():
            torch.testing.assert_close(other[name], slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max() + 1))


def test_a_batch_without_every_report_says_so() -> None:
    completions = list(sampled(6))
    completions[3] = with_sequence(completions[3], top_logprobs=None)
    with pytest.raises(InputError, match="top_logprobs is missing"):
        stats_of(policy(), completions, DPPO(0.15, divergence="topk_tv"), 200)
    with pytest.raises(InputError, match="most probable tokens are missing"):
        policy().divergence(pack([completions[3].sequence], 1).micro_batches[0], KINDS)


def test_an_update_without_tokens_joins_the_others() -> None:
    """A step's figures are over all its updates, some of which may train nothing."""
    completions, objective = sampled(6), DPPO(0.15, divergence="topk_tv")
    alike = [[0.5] * 4] * 4
    (batch,) = batched(grouped(completions, alike), replace(batch_config(), skip_zero_advantage=True))
    moved = policy()
    empty = update_policy(moved, torch.optim.SGD(moved.trainable().values(), lr=0.0), batch, objective, 0.0, 1.0)
    full, divergence, _ = stats_of(moved, completions, objective, 200)
    for parts in ((empty, full), (full, empty)):
        joined = Tokens.cat([s.tokens for s in parts])
        assert joined.divergence is not None
        assert joined.divergence.shape == divergence.shape


# ---- exactly, over the whole vocabulary ----


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.0, marks=pytest.mark.slow)])
def test_exact_divergence_is_the_enumeration(temperature: float) -> None:
    vocab_size = tiny()[0].config.vocab_size
    completions = sampled(vocab_size, temperature=temperature)[:6]
    near = exact_divergence(policy(temperature=temperature), completions)
    assert max(near.tv_p99, near.kl_p99) < 1e-5
    moved = policy(0.05, temperature)
    found, truth = exact_divergence(moved, completions), enumerated(moved, completions, temperature)
    assert found.tokens == sum(len(c.sequence.token_ids) for c in completions)
    for kind, mean, p99 in (("topk_tv", found.tv_mean, found.tv_p99), ("topk_kl", found.kl_mean, found.kl_p99)):
        assert mean == pytest.approx(float(truth[kind].mean()), rel=1e-4)
        assert p99 == pytest.approx(float(truth[kind].double().quantile(0.99)), rel=1e-4)
    assert found.kl_mean > 0.01


def test_exact_divergence_does_not_depend_on_padding_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = tiny()[0].config.vocab_size
    completions, moved = sampled(vocab_size)[:4], policy(0.05)
    whole = exact_divergence(moved, completions)
    parts = [exact_divergence(moved, [c]) for c in completions]
    mean = sum(p.kl_mean * p.tokens for p in parts) / whole.tokens
    assert whole.kl_mean == pytest.approx(mean, rel=1e-9)
    monkeypatch.setattr(chunk_logits, "CHUNK_BYTES", {"cpu": 1})
    assert exact_divergence(moved, completions).kl_mean == pytest.approx(whole.kl_mean, rel=1e-4)
    low = exact_divergence(policy(0.05, dtype=torch.bfloat16), completions)
    assert low.tv_mean == pytest.approx(whole.tv_mean, rel=0.1)


def test_exact_divergence_refuses_what_it_cannot_judge() -> None:
    vocab_size = tiny()[0].config.vocab_size
    with pytest.raises(InputError, match="no completions"):
        exact_divergence(policy(), [])
    with pytest.raises(InputError, match=f"sampling.top_logprobs={vocab_size}"):
        exact_divergence(policy(), sampled(6))
    with pytest.raises(InputError, match=r"temperature 1\.0, policy at 0\.6"):
        exact_divergence(policy(temperature=0.6), sampled(vocab_size)[:1])


# ---- a run ----


def test_a_run_asks_for_what_its_objective_reads() -> None:
    reads = tiny_run(objective=DPPO(0.15, divergence="topk_tv"))
    assert reads.rollout.sampling.top_logprobs == flat_json(reads)["sampling.top_logprobs"] == 20
    assert from_json(json.loads(json.dumps(to_json(reads)))) == reads
    assert configure(reads, sampling=smoke_sampling(top_logprobs=7)).rollout.sampling.top_logprobs == 7
    assert tiny_run().rollout.sampling.top_logprobs == 0
    with pytest.raises(InputError, match=r"objective\.needs='entropy'") as caught:
        configure(Run(), objective=Wanting())
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Wanting(Whole):
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})


@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        pytest.param("topk_tv", {}, id="tv alone"),
        pytest.param("topk_kl", {"entropy_bonus": 0.01}, id="kl with a term"),
        pytest.param("topk_tv", {"entropy_bonus": 0.01}, id="tv with a term", marks=pytest.mark.slow),
        pytest.param("topk_kl", {}, id="kl alone", marks=pytest.mark.slow),
    ],
)
def test_a_run_from_end_to_end(kind: str, terms: dict[str, float], tmp_path: Path) -> None:
    run = tiny_run(objective=DPPO(0.15, divergence=kind), steps=2, prompts=8, optimizer=AdamW(1e-2), **terms)
    train(run, tmp_path)
    records = read_records(tmp_path / METRICS)
    trained = [[u for u in r["updates"] if u["trained_tokens"]] for r in records]
    assert all(updates[0]["divergence_mean"] < 1e-5 for updates in trained)  # the sampler's weights
    assert any(u["divergence_mean"] > 1e-4 for updates in trained for u in updates[1:])
    assert all(r["divergence_p99"] >= r["divergence_mean"] for r in records)


def test_evaluation_asks_for_no_more_than_it_reads(tmp_path: Path) -> None:
    class Listening(ScriptedEngine):
        def generate(self, requests):
            self.asked = [*getattr(self, "asked", []), *((r.key[0], r.sampling.top_logprobs) for r in requests)]
            return super().generate(requests)

    run = tiny_run(objective=DPPO(0.15, divergence="topk_tv"), steps=1)
    engine = Listening(loading.tiny()[1], lambda r: "1" * r.key[-1] + "x")
    train(run, tmp_path, components=with_engine(build(run), engine))
    assert {k for who, k in engine.asked if who == "evaluation"} == {0}
    assert {k for who, k in engine.asked if who != "evaluation"} == {20}


def test_families_with_other_attention_report_their_distribution() -> None:
    """Rows that do not share their prompts go another way through the decoder."""
    model = FAMILIES[sorted(FAMILIES)[0]]().eval()
    asked = Sampling(samples=2, max_new_tokens=5, top_logprobs=4)
    for c in transformers_engine(model).generate(PROBLEMS[:2], asked, (0,)):
        assert c.sequence.top_logprobs is not None
        torch.testing.assert_close(
            c.sequence.top_logprobs.logp, distribution(model, c, 1.0).topk(4).values, rtol=0, atol=1e-4
        )
