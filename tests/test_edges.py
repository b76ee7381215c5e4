"""Numbers at their limits, and what a caller may pass by mistake."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drpo.adapters import figures, reweight, token_loss
from drpo.credit import advantages, gae
from drpo.errors import BrokenLogpError, InputError
from drpo.objectives import (
    DRPO,
    GSPO,
    REGISTRY,
    Objective,
    TokenLoss,
    Tokens,
    diagnose,
    gradient,
    gradient_weight,
    reference_kl,
    total,
    vanishes_at_zero_advantage,
)
from drpo.objectives.contract import unchecked
from drpo.ops import Head, linear_divergence, linear_logprob
from drpo.spec import parse_spec
from drpo.train.metrics import token_metrics
from drpo.types import TopK
from support.head import fused
from support.token_stats import stats_of_tokens

NEVER = -math.inf
CAP = math.exp(20)
SPECS = (
    *("none", "tis(2)", "ppo(0.2,0.28)", "ppo(0.2,0.2,dual=3)", "spo(0.3)", "dppo(0.15)", "drpo(0.2)", "cispo", "gspo"),
    *("dppo(0.05,divergence='kl')", "drpo(0.2,0.5)", "drpo(0.2,outside=0.1)", "drpo(0.2,advantage_weighted=False)"),
    *("reinforce", "k2", "ipo(0.1,1.2)", "icepop(0.5,2)", "kpop(0.05)", "cppo", "vespo", "gmpo", "m2po", "m2po_areal"),
    *("topr", "topr(1,1,'sequence')", "drpo_eff(0.2)", "drpo_eff(0.2,'residual_sech')", "ppo(0.2,0.28,max_ratio=1.3)"),
    *("clip_cov(cov_low=0.3)", "kl_cov", "mask(0.2) + 0.1*k2", "none*band(0.5,2)*opsm(0.1)*reject('seq_mean_k3',0.1)"),
    *("drpo(0.2)*reject('seq_max_k2',0.1)*reject('seq_sum_k1',2,0.5)", "reinforce*weight('sequence',2,normalize=True)"),
    *("cppo(max_ratio=3)", "ref_kl(0.2)"),
    *("sapo", "mask(0.1)", "mask(0.1,'kl')", "penalty('tv',0.5)", "penalty('k1',0.5)", "penalty('k3',0.5)"),
)


def some(n: int = 4, **columns: Any) -> Tokens:
    one = torch.ones(n)
    made = {"logp": -one, "behavior_logp": -one, "advantage": one, "keep": one.bool(), "sequence": one.long()} | {
        "score": one,
        "reference_logp": -one,
    }
    return Tokens(**made | columns)


def at(logp: float, behavior_logp: float, advantage: float) -> Tokens:
    return some(1, **{k: torch.tensor([v]) for k, v in locals().items()})


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("logp", "mu"), [(-1.0, NEVER), (NEVER, -1.0), (NEVER, NEVER)])
def test_probabilities_of_0_give_the_limit(spec: str, logp: float, mu: float) -> None:
    """The limit of ever smaller probabilities, here of -200 nats: r = e^20, r = 0, and r = 1 where both are 0."""
    objective = parse_spec(spec, REGISTRY)
    for advantage in (1.5, -1.5):
        tokens = at(logp, mu, advantage)
        near = at(max(logp, -200.0), max(mu, -200.0), advantage)
        leaf = tokens.logp.clone().requires_grad_()
        loss = total(objective, replace(tokens, logp=leaf), torch.ones(1))
        loss.backward()
        assert loss.isfinite() and leaf.grad is not None
        assert torch.equal(leaf.grad, gradient(objective, tokens))
        torch.testing.assert_close(leaf.grad, gradient(objective, near), rtol=1e-5, atol=1e-30)
        assert gradient_weight(objective, tokens).isfinite().all()
        assert all(
            math.isfinite(v)
            for v in token_metrics(objective, stats_of_tokens(objective, tokens, torch.zeros(1))).values()
        )


def test_reference_kl_at_a_probability_of_0() -> None:
    logp = torch.tensor([NEVER, -1.0]).requires_grad_()
    reference_kl(logp, torch.tensor([-2.0, -2.0]), torch.tensor([-1.0, -1.0])).sum().backward()
    assert logp.grad is not None and logp.grad.tolist() == [0, 1]


def test_gradients_where_there_are_none() -> None:
    with torch.no_grad():
        assert gradient(DRPO(0.2), some()).tolist() == [-1] * 4
    with torch.inference_mode():
        born = some()
        with pytest.raises(InputError, match=r"inference_mode.* use torch.no_grad"):
            gradient(DRPO(0.2), some())
    assert gradient(DRPO(0.2), born).tolist() == [-1] * 4


def head(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(n, 3).requires_grad_(), torch.arange(15.0).reshape(5, 3) / 9, torch.zeros(n, dtype=torch.long)


def given(n: int = 4, **columns: Any) -> dict[str, Any]:
    tokens = vars(some(n))
    return {name: tokens[name] for name in ("behavior_logp", "advantage", "keep", "sequence")} | {
        "token_weight": torch.ones(n),
        **columns,
    }


@pytest.mark.parametrize("kind", ["total", "gspo", "fused", "logp", "entropy"])
def test_a_second_derivative_is_refused(kind: str) -> None:
    hidden, weight, target = head()
    if kind == "fused":
        leaf, loss = hidden, fused(hidden, weight, target, DRPO(0.2), **given()).loss
    elif kind in ("logp", "entropy"):
        leaf, loss = hidden, linear_logprob(hidden, Head(weight), target)[kind == "entropy"].sum()
    else:
        leaf = -torch.ones(4).requires_grad_()
        objective = parse_spec("gspo" if kind == "gspo" else "drpo(0.2)", REGISTRY)
        loss = total(objective, some(logp=leaf), torch.ones(4))
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(slope.sum(), leaf)


def test_functional_transforms_and_compilation_see_through_the_checks() -> None:
    def loss(logp: Tensor) -> Tensor:
        return total(DRPO(0.2), some(logp=logp), torch.ones(4))

    rows = -torch.rand(3, 4)
    wanted = torch.stack([gradient(DRPO(0.2), some(logp=row)) for row in rows])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(rows), wanted)


class Corner:
    """Does something at A = 0 in one corner alone, or promises what it does not keep."""

    tokenwise, needs = True, frozenset({"topk_kl"})

    def __init__(self, where: Any) -> None:
        self.where = where

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(-tokens.advantage * tokens.logp + tokens.logp * self.where(tokens))


CORNERS = {
    "mu < e^-15": lambda t: (t.behavior_logp < -15).float(),
    "r > 1e6": lambda t: (t.logp - t.behavior_logp > 14).float(),
    "divergence > 1": lambda t: (t.divergence > 1).float(),
    "a long sequence": lambda t: ((t.sequence[:, None] == t.sequence).sum(1) > 50).float(),
    "a single token": lambda t: ((t.sequence[:, None] == t.sequence).sum(1) == 1).float(),
}


@pytest.mark.parametrize("where", CORNERS.values(), ids=CORNERS)
def test_what_moves_at_zero_advantage_is_never_skipped(where: Any) -> None:
    corner = Corner(where)
    assert not vanishes_at_zero_advantage(corner)
    corner.vanishes_at_zero_advantage = True  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="promises vanishes_at_zero_advantage"):
        vanishes_at_zero_advantage(corner)


def test_rounding_is_no_signal() -> None:
    noise = torch.tensor([0.1, 0.1, 0.1, 0.10000001])
    assert noise[3] != noise[0]
    for rule in (advantages.mean, advantages.zscore, advantages.rloo, advantages.maxrl):
        assert not rule(noise).any()
        assert rule(torch.tensor([0.1, 0.1, 0.1, 0.1001])).any()
    assert not gae.whitened(noise).any()
    assert gae.explained_variance(torch.rand(4), noise) is None
    with pytest.raises(InputError, match="maxrl divides by their mean; none may be negative"):
        advantages.maxrl(torch.tensor([1.0, -1.0]))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "advantage of each sequence": (
        {"advantage": torch.ones(2)},
        r"tokens.advantage \[2\]: must be \[4\].*per sequence",
    ),
    "probabilities": ({"logp": torch.full((4,), 0.4)}, r"tokens.logp\[0\]=0.4 \(4 of 4 so\).*probabilities"),
    "a positive mu": ({"behavior_logp": torch.full((4,), 0.4)}, r"tokens.behavior_logp\[0\]=0.4"),
    "NaN": ({"logp": torch.tensor([-1.0, math.nan, -1, -1])}, r"tokens.logp\[1\]=nan"),
    "an infinite advantage": ({"advantage": torch.full((4,), math.inf)}, r"tokens.advantage\[0\]=inf"),
    "float keep": ({"keep": torch.ones(4)}, r"tokens.keep torch.float32: must be bool; write keep.bool\(\)"),
    "int keep": ({"keep": torch.ones(4).long()}, r"tokens.keep torch.int64: must be bool"),
    "short sequence": ({"sequence": torch.ones(2).long()}, r"tokens.sequence \[2\]: must be \[4\].*of every token"),
    "float sequence": ({"sequence": torch.ones(4)}, r"tokens.sequence torch.float32: must be int"),
    "rows": ({"logp": -torch.ones(2, 2)}, r"tokens.logp \[2, 2\]: must be \[T\].*reshape\(-1\)"),
    "another device": ({"advantage": torch.ones(4, device="meta")}, "tokens.advantage is on meta, logp on cpu"),
    "a list": ({"advantage": [1.0] * 4}, "tokens.advantage: must be a tensor, not list"),
}


@pytest.mark.parametrize(("columns", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_column_that_cannot_be_is_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        some(**columns)


def test_weights_that_cannot_be_are_refused_and_masked_slots_may_hold_anything() -> None:
    for weight, message in ((torch.ones(1), r"weight \[1\]: must be \[4\]"), (-torch.ones(4), "at least 0")):
        with pytest.raises(InputError, match=message):
            total(DRPO(0.2), some(), weight)
    junk = torch.tensor([-1.0, math.nan, math.inf, 7.0])
    keep = torch.tensor([True, False, False, False])
    masked = some(logp=junk, behavior_logp=junk, advantage=junk.abs(), keep=keep)
    assert total(DRPO(0.2), masked, junk.abs()) == -1


def test_wrong_ids_and_swapped_most_probable_tokens_are_refused() -> None:
    hidden, weight, target = head()
    with pytest.raises(InputError, match=r"target has -100: must be in \[0, 5\).*set their keep to False"):
        fused(hidden, weight, target - 100, DRPO(0.2), **given())
    with pytest.raises(InputError, match="target has 5"):
        linear_logprob(hidden, Head(weight), target + 5)
    ids, logp = torch.tensor([[0, 1]] * 4), torch.tensor([[-0.5, -2.0]] * 4)
    for top, message in ((TopK(logp, ids), "are ids and logp swapped"), (TopK(ids, logp.flip(1)), "falling")):
        with pytest.raises(InputError, match=message):
            linear_divergence(hidden, Head(weight), target, top)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": torch.ones(5, 3)}, r"head: must be a drpo.ops.Head\(weight\), not Tensor"),
        ({"hidden": [1.0]}, "hidden: must be a tensor, not list"),
        ({"temperature": "1"}, "temperature='1': must be > 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"chunk": 1.5}, "chunk=1.5: must be at least 1"),
    ],
)
def test_what_the_operator_cannot_multiply_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    hidden, weight, target = head()
    with pytest.raises(InputError, match=message):
        linear_logprob(**{"hidden": hidden, "head": Head(weight), "target": target} | wrong)


def test_what_is_no_tokens_is_refused_and_short_integers_number_sequences() -> None:
    for ask in (lambda t: total(GSPO(), t, torch.ones(4)), lambda t: gradient_weight(GSPO(), t), diagnose):
        with pytest.raises(InputError, match=r"tokens: must be drpo\.objectives\.Tokens"):
            ask({})
    short, long = (
        some(sequence=torch.tensor([0, 0, 1, 1], dtype=torch.uint8)),
        some(sequence=torch.tensor([0, 0, 1, 1])),
    )
    assert torch.equal(gradient_weight(GSPO(), short), gradient_weight(GSPO(), long))


class Lacking:
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(-tokens.logp)


class Returning(Lacking):
    tokenwise = True

    def __init__(self, made: Any) -> None:
        self.made = made

    def __call__(self, tokens: Tokens) -> Any:
        return self.made(tokens)


WRONG: dict[str, tuple[Any, str]] = {
    "text": ("drpo(0.2)", r"objective='drpo\(0.2\)' is text: build it with drpo.spec.parse_spec"),
    "a class": (DRPO, "objective DRPO is a class: pass an instance"),
    "no tokenwise": (Lacking(), "has no `tokenwise`; an objective has"),
    "a scalar": (Returning(lambda t: TokenLoss(t.logp.sum())), r"a loss of shape \[\] .*; an objective has"),
    "a tensor": (Returning(lambda t: t.logp), "returned Tensor; an objective has"),
    "detached": (Returning(lambda t: TokenLoss(t.logp.detach())), "without a gradient .*; an objective has"),
}


@pytest.mark.parametrize(("objective", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_objective_gets_one_sentence_everywhere(objective: Objective, message: str) -> None:
    tokens, one = some(logp=-torch.ones(4).requires_grad_()), torch.ones(4)
    ways = (
        lambda: total(objective, tokens, one),
        lambda: gradient(objective, tokens),
        lambda: gradient_weight(objective, tokens),
        lambda: fused(*head(), objective, **given()),
    )
    for way in ways:
        with pytest.raises(InputError, match=message):
            way()


def test_diagnose_finds_what_is_wrong_and_no_more() -> None:
    make = torch.Generator().manual_seed(0)

    def said(sampled: float, reported: float, trained: float) -> str:
        logits = 2 * torch.randn(3000, 200, generator=make)
        distribution = {t: torch.log_softmax(logits / t, -1) for t in (sampled, reported, trained)}
        ids = torch.multinomial(distribution[sampled].exp(), 1, generator=make)
        pi, mu = (distribution[t].gather(1, ids)[:, 0] for t in (trained, reported))
        return " ".join(diagnose(some(3000, logp=pi, behavior_logp=mu, advantage=torch.randn(3000, generator=make))))

    assert said(1.0, 1.0, 1.0) == said(0.7, 0.7, 1.0) == said(1.0, 1.0, 0.7) == ""
    assert "the mean of pi/mu is 0." in said(0.7, 1.0, 1.3)
    assert "the mean of pi/mu is 1" in said(0.7, 1.0, 0.7)
    for _ in range(40):  # heavy tails: r is lognormal of mean 1, up to sigma 3
        moved = torch.randn(500, generator=make)
        for sigma in (0.3, 1.0, 2.0, 3.0):
            logp = -40 + sigma * moved - sigma**2 / 2
            tokens = some(500, logp=logp, behavior_logp=torch.full((500,), -40.0), advantage=moved)
            assert diagnose(tokens) == []
    assert "every advantage is 0" in diagnose(some(advantage=torch.zeros(4)))[0]
    assert "behavior_logp is -inf at 4 of 4" in diagnose(some(behavior_logp=torch.full((4,), NEVER)))[0]


def test_diagnose_counts_what_is_broken() -> None:
    """Also where `Tokens` checks no values, as on a GPU."""

    def said(n: int = 4, **columns: Tensor) -> list[str]:
        return [line.partition(":")[0] for line in diagnose(unchecked(**vars(some(n)) | columns))]

    rising, broken = torch.arange(4.0), torch.tensor([-1.0, math.nan, 0.5, NEVER])
    assert said(advantage=rising) == said(1) == []
    assert said(keep=torch.zeros(4).bool()) == ["no token is kept"]
    kinds = [f"logp is {kind} at 1 of 4 tokens" for kind in ("NaN", "positive", "-inf")]
    assert said(logp=broken, advantage=rising) == kinds
    assert said(behavior_logp=broken, advantage=0 * rising)[2:] == [f"behavior_{kinds[2]}", "every advantage is 0"]
    assert said(advantage=torch.tensor([1.0, math.inf, math.nan, 0.0])) == ["advantage is not finite at 2 of 4 tokens"]
    assert said(advantage=torch.full((4,), 2.0)) == ["every advantage is 2"]
    capped = -torch.tensor([22.0] + [1.0] * 99)
    assert said(100, behavior_logp=capped, advantage=capped) == ["1.0% of the ratios are beyond e^20"]
    one_in_thousand = torch.cat([capped, -torch.ones(900)])
    assert said(1000, behavior_logp=one_in_thousand, advantage=one_in_thousand) == []
    moved, up = torch.full((300,), -2.0), torch.arange(300.0)
    assert said(300, logp=moved, advantage=up)[0].startswith("the mean of pi/mu is 0.37")
    positive = torch.where(torch.arange(300) < 20, 0.05, moved)  # whose mean ratio says nothing
    assert said(300, logp=positive, advantage=up) == ["logp is positive at 20 of 300 tokens"]


@pytest.mark.parametrize(
    ("ratios", "wrong"),
    [
        ([0.6] * 199, False),  # too few
        ([0.6] * 200, True),
        ([1.04] * 200, False),
        ([1.06] * 200, True),
        ([0.7, 1.7] * 100, True),  # 5 standard errors are 0.18
        ([0.6, 1.8] * 100, False),  # 0.21
        ([0.1] * 999 + [5.0], False),  # a large ratio that is rarely drawn is missing, most likely
        ([1.1] * 999 + [5.0], True),
    ],
)
def test_the_mean_ratio_is_judged_by_its_own_noise(ratios: list[float], wrong: bool) -> None:
    logp = torch.tensor(ratios).log() - 3
    found = diagnose(
        some(len(ratios), logp=logp, behavior_logp=torch.full_like(logp, -3), advantage=torch.arange(len(ratios)) - 1.0)
    )
    mean = sum(ratios) / len(ratios)
    assert [line[:24] for line in found] == [f"the mean of pi/mu is {mean:.2f}"[:24]] * wrong


@pytest.mark.parametrize(
    ("column", "value"),
    [*((column, value) for column in (0, 1) for value in (math.nan, math.inf, NEVER, 0.5)), (1, -9999.0)],
)
def test_adapters_stop_at_a_thousandth_of_broken_log_probabilities(column: int, value: float) -> None:
    objective, keep = DRPO(0.2), torch.ones(4, 1000)
    keep[:, -1] = 0
    for n_broken, stops in ((3, False), (4, True)):
        values = [-torch.ones(4, 1000), -torch.ones(4, 1000)]
        values[column][:, -1] = math.nan  # padding counts nowhere
        values[column][0, :n_broken] = value
        for way in (reweight, token_loss, figures):
            if stops:
                with pytest.raises(BrokenLogpError, match="4 of 3996 kept tokens, more than a thousandth"):
                    way(objective, *values, torch.ones(4), keep)
            else:
                way(objective, *values, torch.ones(4), keep)
    with pytest.raises(InputError, match="advantage: NaN or infinite at 999 of 3996"):
        reweight(objective, -keep, -keep, torch.tensor([1.0, math.nan, 1.0, 1.0]), keep)
