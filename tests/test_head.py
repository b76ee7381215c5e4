"""A head with a bias, a scale and a soft cap: the plain formula in float64, value and every gradient.

Not covered: GPUs. Heads that are a weight alone: test_ops.py, test_policy_loss.py, test_topk.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives import DPPO, DRPO, GSPO, Objective, Tokens, topk_tv, total
from drpo.ops import Head, SampledTokens, chunk_logits, linear_divergence, linear_logprob, linear_policy_loss
from drpo.types import TopK
from support.grids import each_pair

T, V, H, K = 23, 37, 8, 4
PARTS = [
    (bias, scale, cap) for bias, scale, cap in itertools.product((False, True), (1.0, 0.3), (None, 4.0))
]  # fmt: skip
NAMES = [f"{'bias ' * b}scale {s} cap {c}" for b, s, c in PARTS]


def leaves(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((T, H), (V, H), (V,))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).mul(2).to(dtype).requires_grad_() for s in sizes]
    return made[0], made[1], made[2] if bias else None


def plain_distribution(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, t: float
) -> Tensor:
    x = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return torch.log_softmax((x if cap is None else cap * torch.tanh(x / cap)) / t, dim=-1)


def gradients(value: Tensor, inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(value, [x for x in inputs if x is not None]))


def sampled(distribution: Tensor) -> SampledTokens:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(V, (T,), generator=generator)
    other = (
        distribution.detach() + 0.2 * torch.randn(T, V, generator=generator, dtype=distribution.dtype)
    ).log_softmax(-1)
    top_logp, ids = other.topk(K)
    return SampledTokens(
        target,
        other.gather(1, target[:, None])[:, 0],
        torch.randn(T, generator=generator, dtype=distribution.dtype),
        torch.rand(T, generator=generator) > 0.2,
        torch.arange(T) // 3,
        torch.rand(T, generator=generator, dtype=distribution.dtype),
        TopK(ids, top_logp),
    )


@pytest.mark.parametrize(("bias", "scale", "cap"), PARTS, ids=NAMES)
def test_log_probabilities_and_entropy(bias: bool, scale: float, cap: float | None) -> None:
    inputs = leaves(bias)
    distribution = plain_distribution(*inputs, scale, cap, 0.7)
    target = sampled(distribution).target
    up, down = torch.linspace(-1, 2, T, dtype=torch.float64), torch.linspace(1, -1, T, dtype=torch.float64)
    wanted = distribution.gather(1, target[:, None])[:, 0], -(distribution.exp() * distribution).sum(-1)
    for with_entropy, chunk in itertools.product((0, 1), (1, 5, None)):
        found = linear_logprob(inputs[0], Head(*inputs[1:], scale, cap), target, 0.7, chunk=chunk)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        pairs = [(up * logp + with_entropy * down * entropy).sum() for logp, entropy in (found, wanted)]
        slopes = [torch.autograd.grad(x, [i for i in inputs if i is not None], retain_graph=True) for x in pairs]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


OBJECTIVES = {"drpo": DRPO(0.2), "gspo": GSPO(0.2, 0.28), "topk": DPPO(0.05, divergence="topk_tv")}


@each_pair("bias, scale, cap, objective", (False, True), (1.0, 0.3), (None, 4.0), [*OBJECTIVES.values()])
def test_the_fused_loss(bias: bool, scale: float, cap: float | None, objective: Objective) -> None:
    inputs = leaves(bias)
    distribution = plain_distribution(*inputs, scale, cap, 0.7)
    given = sampled(distribution)
    assert given.top_logprobs is not None
    logp = distribution.gather(1, given.target[:, None])[:, 0]
    moved = topk_tv(distribution.detach().gather(1, given.top_logprobs.ids), given.top_logprobs.logp)
    columns = (given.behavior_logp, given.advantage, given.keep, given.sequence)
    wanted = total(objective, Tokens(logp, *columns, moved), given.weight)
    wanted_gradients = gradients(wanted, inputs)
    for chunk in (1, 5, None):
        head = Head(*inputs[1:], scale, cap)
        found = linear_policy_loss(inputs[0], head, given, objective, temperature=0.7, chunk=chunk)
        torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=1e-12)
        for one, other in zip(gradients(found.loss, inputs), wanted_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        if found.divergence is not None:
            torch.testing.assert_close(found.divergence[given.keep], moved[given.keep], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounded_inputs_are_no_worse_than_the_usual_way(dtype: torch.dtype) -> None:
    inputs = leaves(True, dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs if x is not None)
    shape = (0.3, 4.0)
    target = sampled(plain_distribution(*exact, *shape, 1.0)).target
    errors = []
    truth = gradients(plain_distribution(*exact, *shape, 1.0).gather(1, target[:, None]).sum(), exact)
    for way in ("usual", "chunked"):
        if way == "usual":
            x = (inputs[0] @ inputs[1].T + inputs[2]) * shape[0]
            logits = (shape[1] * torch.tanh(x / shape[1])).float()
            logp = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
        else:
            logp, _ = linear_logprob(inputs[0], Head(*inputs[1:], *shape), target, chunk=5)
        found = gradients(logp.sum(), inputs)
        errors.append([float((a.double() - b).norm()) for a, b in zip(found, truth, strict=True)])
    for usual, ours, size in zip(*errors, truth, strict=True):
        assert ours <= 1.2 * usual + 2 * torch.finfo(dtype).eps * float(size.norm())


def test_the_policy_is_nowhere_from_itself() -> None:
    hidden, weight, bias = leaves(True)
    head = Head(weight, bias, 0.3, 4.0)
    logp, ids = head.logits(hidden.detach()).detach().log_softmax(-1).sort(-1, descending=True)
    _, _, moved = linear_divergence(hidden, head, ids[:, 3], TopK(ids, logp), chunk=5)
    assert float(moved["topk_tv"].max()) < 1e-12


def test_a_cap_is_applied_in_blocks_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias = leaves(True)
    target = torch.arange(T)
    whole = linear_logprob(hidden, Head(weight, bias, 0.3, 4.0), target)
    monkeypatch.setattr(chunk_logits, "BLOCK", 5)
    for one, other in zip(linear_logprob(hidden, Head(weight, bias, 0.3, 4.0), target), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": torch.ones(5)}, r"head.weight \[5\], head.bias None: do not fit \[V, H\], \[V\]"),
        ({"bias": torch.ones(4)}, r"head.bias \[4\]: do not fit"),
        ({"bias": [0.0] * 5}, "head.bias: must be a tensor, not list"),
        ({"weight": torch.ones(5, 3, dtype=torch.int64)}, "head.weight torch.int64: must be float"),
        ({"scale": 0.0}, "head.scale=0.0: must be > 0"),
        ({"soft_cap": -1.0}, "head.soft_cap=-1.0: must be > 0"),
    ],
)
def test_what_is_no_head_is_refused_by_name(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Head(torch.ones(5, 3)), **wrong)
