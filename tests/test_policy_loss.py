"""The fused loss is the plain one: `total` over log-probabilities that autograd goes through, with all logits at hand.

Not covered: GPUs, speed, and objectives' own formulas (test_objectives.py).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from drpo import objectives, reductions
from drpo.errors import InputError
from drpo.objectives import CPPO, DRPO, GSPO, M2PO, OPSM, VESPO, Objective, PPOClip, Product, total
from drpo.ops import PolicyLoss, chunk_logits
from drpo.reductions import Horizon
from drpo.spec import parse_spec
from drpo.types import TokenLoss, Tokens
from support.grids import each_pair
from support.head import CHUNKS, HEAD, TEMPERATURES, Largest, error, fused, inputs, logits_at_once

REDUCTIONS = {"token_mean": reductions.token_mean, "sequence_mean": reductions.sequence_mean, "horizon": Horizon(20)}
T, V = 23, 37


@dataclass(frozen=True)
class Own:
    """A user's objective, with a metric, that asks for nothing to be registered."""

    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        loss = -tokens.advantage * torch.tanh(tokens.logp - tokens.behavior_logp) + 0.1 * tokens.logp.square()
        return TokenLoss(loss, {"mu": tokens.behavior_logp.exp()})


SPECS = (
    *("none", "tis(2)", "ppo(0.2, 0.28)", "spo(0.3)", "dppo(0.15)", "drpo(0.2)"),
    *("cispo", "gspo", "sapo", "mask(0.15)", "penalty('tv', 0.3)"),
    *(
        "reinforce*weight('sequence', 2)",
        "ipo(0.2)",
        "icepop(1e-4, 5)",
        "kpop",
        "cppo(0.1)",
        "vespo",
        "gmpo",
        "m2po",
        "m2po_areal",
    ),
    *("clip_cov(fraction=0.5, cov_low=0.1)", "kl_cov(0.1)", "mask(0.2) + 0.1*k2"),
    *("drpo(0.2)*reject('seq_mean_k3', 9.0)*opsm(4.0)", "none*band(1e-4, 3.0, 'geometric')"),
    "ppo*proximal*weight('token', 5)*binary_kl(0.5)",
    "ppo*proximal*second_moment(0.5)",
    *("vespo(max_ratio=1.5)", "topr", "topr(1, 1, 'sequence')", "drpo_eff(0.2)", "ppo(0.2, 0.28, max_ratio=1.3)"),
    "ref_kl(0.1) + 0.1*k2",
)
OBJECTIVES: dict[str, Objective] = {text: parse_spec(text, objectives.REGISTRY) for text in SPECS} | {"own": Own()}
NAMED = {name for text in SPECS for name in re.findall(r"(?<![\w'])[a-z]\w*(?=[(*+ ]|$)", text)}
assert {*objectives.REGISTRY.entries} <= NAMED, "SPECS has one of each name"


def columns(t: int = T, *, reduction: str = "token_mean", seed: int = 0) -> dict[str, Tensor]:
    """What is known of each token: sequences of unlike lengths, and a third of the tokens not kept."""
    generator = torch.Generator().manual_seed(seed)
    sequence = (torch.arange(t) ** 0.7).long()
    keep = torch.rand(t, generator=generator) > 0.3
    keep[0] = True
    return {
        "behavior_logp": -4 * torch.rand(t, generator=generator, dtype=torch.float64) - 0.01,
        "advantage": torch.randn(t, generator=generator, dtype=torch.float64),
        "keep": keep,
        "sequence": sequence,
        "proximal_logp": -4 * torch.rand(t, generator=generator, dtype=torch.float64) - 0.01,
        "score": torch.randn(t, generator=generator, dtype=torch.float64)[sequence],
        "reference_logp": -4 * torch.rand(t, generator=generator, dtype=torch.float64) - 0.01,
        "token_weight": REDUCTIONS[reduction](keep, sequence).double(),
    }


class Plain(NamedTuple):
    loss: Tensor
    logp: Tensor


def plain(
    hidden: Tensor, weight: Tensor, target: Tensor, objective: Objective, *, temperature: float = 1.0, **given: Tensor
) -> Plain:
    logp, _ = logits_at_once(hidden, weight, target, temperature)
    names = ("behavior_logp", "advantage", "keep", "sequence", "proximal_logp", "score", "reference_logp")
    tokens = Tokens(logp, **{name: given.get(name) for name in names})
    return Plain(total(objective, tokens, given["token_weight"]), logp.detach())


Loss = Callable[..., Plain | PolicyLoss]


def run(
    operator: Loss,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    up: float = 1.0,
    **given: object,
) -> dict[str, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = operator(h, w, target, objective, **given)
    (up * found.loss).backward()
    assert h.grad is not None
    assert w.grad is not None
    return {"loss": found.loss.detach(), "logp": found.logp, "d hidden": h.grad, "d weight": w.grad}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], keep: Tensor) -> None:
    for name in ("loss", "d hidden", "d weight"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(found["logp"], torch.where(keep, wanted["logp"], 0), rtol=1e-12, atol=1e-12)


@each_pair("name, reduction, temperature", [*OBJECTIVES], [*REDUCTIONS], TEMPERATURES)
def test_it_is_the_plain_loss(name: str, reduction: str, temperature: float) -> None:
    hidden, weight, target = inputs(T, V, torch.float64)
    given = columns(reduction=reduction)
    wanted = run(plain, hidden, weight, target, OBJECTIVES[name], temperature=temperature, **given)
    assert wanted["d hidden"].any()
    for chunk in CHUNKS:
        found = run(fused, hidden, weight, target, OBJECTIVES[name], temperature=temperature, chunk=chunk, **given)
        assert_equal(found, wanted, given["keep"])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("objective", [DRPO(0.2), GSPO()], ids=["drpo", "gspo"])
def test_a_tied_head_gets_both_gradients(objective: Objective, chunk: int | None) -> None:
    _, table, target = inputs(T, V, torch.float64)
    ids = torch.arange(T) * 7 % V

    def gradient(operator: Loss, **options: object) -> Tensor:
        embedding = table.clone().requires_grad_()
        loss = operator(torch.tanh(embedding[ids]), embedding, target, objective, **columns(), **options).loss
        (slope,) = torch.autograd.grad(loss, embedding)
        return slope

    found = gradient(fused, chunk=chunk)
    torch.testing.assert_close(found, gradient(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [DRPO(0.2), PPOClip(), GSPO()], ids=["drpo", "ppo", "gspo"])
def test_what_is_left_out_is_as_good_as_gone(objective: Objective) -> None:
    """To the bit, whatever stands there: not kept, or of weight 0."""
    hidden, weight, target = inputs(T, V, torch.float32)
    given = {name: c.float() if c.dtype == torch.float64 else c for name, c in columns().items()}
    given["token_weight"][given["keep"].nonzero()[3:6]] = 0
    trained = given["keep"] & (given["token_weight"] != 0)
    found = run(fused, hidden, weight, target, objective, **given)
    removed = {name: column[trained] for name, column in given.items()}
    wanted = run(fused, hidden[trained], weight, target[trained], objective, **removed)
    assert torch.equal(found["loss"], wanted["loss"])
    assert torch.equal(found["d weight"], wanted["d weight"])
    assert torch.equal(found["d hidden"][trained], wanted["d hidden"])
    assert not found["d hidden"][~trained].any()
    hidden[~trained], given["behavior_logp"][~trained], given["advantage"][~trained] = torch.nan, -200.0, torch.inf
    poisoned = run(fused, hidden, weight, target, objective, **given)
    assert all(torch.equal(poisoned[name], value) for name, value in found.items())


@pytest.mark.parametrize("objective", [DRPO(0.2), GSPO()], ids=["drpo", "gspo"])
def test_nothing_kept(objective: Objective) -> None:
    hidden, weight, target = inputs(T, V, torch.float64)
    given = columns() | {"keep": torch.zeros(T, dtype=torch.bool)}
    found = run(fused, hidden, weight, target, objective, **given)
    assert not any(value.any() for value in found.values())


def test_the_loss_may_be_scaled_before_its_backward_pass() -> None:
    hidden, weight, target = inputs(T, V, torch.float64)
    found = run(fused, hidden, weight, target, DRPO(0.2), up=-2.5, **columns())
    wanted = run(plain, hidden, weight, target, DRPO(0.2), up=-2.5, **columns())
    assert_equal(found, wanted, columns()["keep"])


def test_the_gradient_is_released_after_one_backward_pass() -> None:
    hidden, weight, target = inputs(T, V, torch.float64)
    loss = fused(hidden.requires_grad_(), weight, target, DRPO(0.2), **columns()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="released after one backward pass"):
        loss.backward()


def products(objective: Objective, trained: tuple[str, ...], rows: int) -> float:
    """Multiplications of a forward and a backward pass, in units of one product [rows, H] x [H, V]."""
    hidden, weight, target = inputs(T, V, torch.float32)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    with FlopCounterMode(display=False) as counter:
        loss = fused(hidden, weight, target, objective, chunk=5, **columns()).loss
        if trained:
            loss.backward()
    return counter.get_total_flops() / (2 * rows * HEAD * V)


def test_three_products_and_none_for_what_is_left_out() -> None:
    rows = int(columns()["keep"].sum())
    assert rows < T
    assert products(DRPO(0.2), ("hidden", "weight"), rows) == 3
    assert products(DRPO(0.2), ("hidden",), rows) == 2
    assert products(DRPO(0.2), ("weight",), rows) == 2
    assert products(DRPO(0.2), (), rows) == 1
    for objective in (GSPO(), CPPO(), VESPO(), M2PO(), Product(DRPO(0.2), (OPSM(0.5),))):
        assert products(objective, ("hidden", "weight"), rows) == 4, objective


@pytest.mark.parametrize("objective", [DRPO(0.2), CPPO(), M2PO()], ids=["token", "sequence", "batch"])
def test_never_holds_the_logits(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    t, v = 300, 515
    hidden, weight, target = inputs(t, v, torch.float32)
    monkeypatch.setattr(chunk_logits, "CHUNK_BYTES", {"cpu": 8 * v * 4})
    with Largest() as seen:
        run(fused, hidden, weight, target, objective, **columns(t))
    assert seen.numel <= max(v * HEAD, t * HEAD, 8 * v) < t * v / 10
    with Largest() as seen:
        run(plain, hidden, weight, target, DRPO(0.2), **columns(t))
    assert seen.numel >= t * v


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("v", [37, 515])
def test_bfloat16_is_no_worse_than_the_usual_way(v: int, temperature: float) -> None:
    hidden, weight, target = inputs(64, v, torch.bfloat16)
    given = columns(64)
    truth = run(plain, hidden.double(), weight.double(), target, DRPO(0.2), temperature=temperature, **given)
    usual = run(plain, hidden, weight, target, DRPO(0.2), temperature=temperature, **given)
    keep = given["keep"]
    for chunk in CHUNKS:
        found = run(fused, hidden, weight, target, DRPO(0.2), temperature=temperature, chunk=chunk, **given)
        for name in ("loss", "d hidden", "d weight"):
            floor = 2e-3 * (1e-3 + float(truth[name].norm()))
            assert error(found[name], truth[name]) <= 1.5 * error(usual[name], truth[name]) + floor, (name, chunk)
        assert error(found["logp"][keep], truth["logp"][keep]) <= error(usual["logp"][keep], truth["logp"][keep])


def test_metrics_are_the_objectives_and_the_entropy() -> None:
    hidden, weight, target = inputs(T, V, torch.float64)
    given = columns()
    keep = given["keep"]
    _, entropy = logits_at_once(hidden, weight, target, 1.0)
    for chunk in CHUNKS:
        found = fused(hidden, weight, target, Own(), chunk=chunk, **given)
        assert set(found.metrics) == {"mu"}
        torch.testing.assert_close(found.metrics["mu"], torch.where(keep, given["behavior_logp"].exp(), 0))
        torch.testing.assert_close(found.entropy, torch.where(keep, entropy, 0))


def test_what_is_wrong_is_named() -> None:
    hidden, weight, target = inputs(T, V, torch.float32)
    given = columns()
    with pytest.raises(InputError, match="advantage"):
        fused(hidden, weight, target, DRPO(0.2), **given | {"advantage": given["advantage"][:-1]})
    with pytest.raises(InputError, match="chunk=0"):
        fused(hidden, weight, target, DRPO(0.2), **given, chunk=0)
    with pytest.raises(InputError, match="temperature"):
        fused(hidden, weight, target, DRPO(0.2), **given, temperature=0.0)
    with pytest.raises(InputError, match="fit"):
        fused(hidden[:, 1:], weight, target, DRPO(0.2), **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("objective", [DRPO(0.2), GSPO()], ids=["drpo", "gspo"])
def test_a_tiny_token_weight_costs_nothing_in_16_bits(objective: Objective, dtype: torch.dtype) -> None:
    """As `horizon(8192)` with 500 completions gives it, the loss scaled up again by 2^16."""
    hidden, weight, target = inputs(64, 515, dtype)
    given = columns(64) | {"token_weight": torch.full((64,), 2.4e-7)}
    given["behavior_logp"] -= 3
    truth = run(plain, hidden.double(), weight.double(), target, objective, up=65536.0, **given)
    found = run(fused, hidden, weight, target, objective, up=65536.0, chunk=5, **given)
    for name in ("d hidden", "d weight"):
        assert float(truth[name].norm()) > 0
        assert error(found[name], truth[name]) <= 6 * torch.finfo(dtype).eps * float(truth[name].norm()), name


def test_no_sum_over_a_chunk_overflows_in_float16() -> None:
    """2,000 tokens of one word, with states of 60: the product's sum would be 1.2e5, beyond float16."""
    hidden, weight = torch.full((2000, HEAD), 60.0, dtype=torch.float16), torch.zeros(V, HEAD, dtype=torch.float16)
    one = torch.ones(2000)
    given = {"behavior_logp": -one, "advantage": one, "keep": one.bool(), "sequence": one.long()}
    given["token_weight"] = one / 2000
    target = torch.zeros(2000, dtype=torch.int64)
    truth = run(plain, hidden.double(), weight.double(), target, DRPO(0.2), **given)["d weight"]
    found = run(fused, hidden, weight, target, DRPO(0.2), chunk=2000, **given)["d weight"]
    assert error(found, truth) <= 0.01 * float(truth.norm())
