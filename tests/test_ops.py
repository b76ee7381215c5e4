"""The head operator against a float64 truth, forward and backward, over shapes, chunks, temperatures and dtypes.

In bfloat16 the budget is the error that the usual bfloat16 path (all logits, log_softmax, autograd) makes itself.

Not covered: GPUs, speed, and the gradient in `hidden` where a logit is -inf (0 * inf there, as in any matrix
product with that weight).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.ops import Head, chunk_logits, linear_logprob, reference
from support.grids import each_pair
from support.head import CHUNKS, HEAD, TEMPERATURES, Largest, error, inputs, logits_at_once

TOKENS = (1, 7, 64)
WORDS = (2, 37, 515)
Operator = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def oracle(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Row by row in NumPy's float64."""
    logps, entropies = [], []
    for h, y in zip(hidden.detach().double().numpy(), target.tolist(), strict=True):
        z = weight.detach().double().numpy() @ h / temperature
        z = z - z.max()
        p = np.exp(z) / np.exp(z).sum()
        logps.append(z[y] - math.log(np.exp(z).sum()))
        entropies.append(-sum(x * math.log(x) for x in p if x > 0))
    return np.array(logps), np.array(entropies)


def run(operator: Operator, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> dict[str, Tensor]:
    """Both outputs, and the gradients of each output alone, with other slopes at every token."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = operator(h, w, target, temperature)
    slope = torch.linspace(-1.3, 0.9, len(target), dtype=torch.float64)
    found = {"logp": logp.detach(), "entropy": entropy.detach()}
    for name, output in (("logp", logp), ("entropy", entropy)):
        grads = torch.autograd.grad((output * slope.to(output.dtype)).sum(), (h, w), retain_graph=True)
        found |= {f"d {name} / d hidden": grads[0], f"d {name} / d weight": grads[1]}
    both = torch.autograd.grad((logp * slope.to(logp.dtype)).sum() + 0.3 * entropy.sum(), (h, w))
    return found | {"d both / d hidden": both[0], "d both / d weight": both[1]}


def truth(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> dict[str, Tensor]:
    return run(logits_at_once, hidden.double(), weight.double(), target, temperature)


def in_chunks(chunk: int | None) -> Operator:
    return lambda h, w, y, temperature: linear_logprob(h, Head(w), y, temperature, chunk=chunk)


def in_head(t: int, v: int) -> tuple[Tensor, Head, Tensor]:
    hidden, weight, target = inputs(t, v, torch.float32)
    return hidden, Head(weight), target


def rounding(name: str, hidden: Tensor, weight: Tensor, temperature: float) -> float:
    """What rounding the logits once or twice in their dtype may do to an output, or to a gradient."""
    logits = hidden.double() @ weight.double().T / temperature
    each = torch.finfo(hidden.dtype).eps * (1 + float(logits.abs().max())) * math.sqrt(len(hidden))
    factor = {"hidden": weight, "weight": hidden}.get(name.rpartition(" ")[2])
    return each if factor is None else each * float(torch.linalg.matrix_norm(factor.double(), 2)) / temperature


@each_pair("operator, t, v, temperature", [reference.linear_logprob, linear_logprob], TOKENS, WORDS, TEMPERATURES)
def test_values_are_the_formula(operator: Operator, t: int, v: int, temperature: float) -> None:
    hidden, weight, target = inputs(t, v, torch.float64)
    logp, entropy = operator(hidden, Head(weight), target, temperature)
    wanted_logp, wanted_entropy = oracle(hidden, weight, target, temperature)
    np.testing.assert_allclose(logp.numpy(), wanted_logp, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(entropy.numpy(), wanted_entropy, rtol=1e-11, atol=1e-12)


@each_pair("dtype, t, v, temperature", [torch.float64, torch.float32], TOKENS, WORDS, TEMPERATURES)
def test_outputs_and_gradients(dtype: torch.dtype, t: int, v: int, temperature: float) -> None:
    hidden, weight, target = inputs(t, v, dtype)
    true = truth(hidden, weight, target, temperature)
    usual = run(logits_at_once, hidden, weight, target, temperature)
    for chunk in CHUNKS:
        found = run(in_chunks(chunk), hidden, weight, target, temperature)
        for name, value in found.items():
            assert value.dtype == dtype
            budget = 1.5 * error(usual[name], true[name]) + rounding(name, hidden, weight, temperature)
            assert error(value, true[name]) <= budget, (name, chunk)


@pytest.mark.parametrize("offset", [-1e4, 30.0, 1e3])
def test_a_constant_added_to_all_logits_costs_no_more_than_their_rounding(offset: float) -> None:
    hidden, weight, target = inputs(64, 515, torch.float32)
    hidden[:, 0], weight[:, 0] = 1, offset
    found = run(in_chunks(7), hidden, weight, target, 1.0)
    true = truth(hidden, weight, target, 1.0)
    for name in ("logp", "entropy"):
        assert error(found[name], true[name]) <= 2 * rounding(name, hidden, weight, 1.0), name


def test_entropy_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, HEAD, generator=generator) * torch.logspace(-2, 1.5, 200)[:, None]
    weight = torch.randn(37, HEAD, generator=generator)
    logp, entropy = linear_logprob(hidden, Head(weight), torch.zeros(200, dtype=torch.int64))
    assert (entropy >= 0).all()
    assert (entropy < 1e-3).any()
    assert (entropy > 1).any()
    assert (logp <= 0).all()


@each_pair("master, t, v, temperature", [False, True], TOKENS, WORDS, TEMPERATURES)
def test_bfloat16_is_no_worse_than_the_usual_way(master: bool, t: int, v: int, temperature: float) -> None:
    hidden, weight, target = inputs(t, v, torch.bfloat16)
    if master:
        weight = weight.float()  # the same numbers, so the truth is the same; the gradient comes back wider
    true = truth(hidden, weight, target, temperature)
    usual = run(logits_at_once, hidden, weight, target, temperature)
    for chunk in CHUNKS:
        found = run(in_chunks(chunk), hidden, weight, target, temperature)
        for name, value in found.items():
            assert value.dtype == usual[name].dtype
            floor = 2e-3 * (1 + float(true[name].norm()))
            assert error(value, true[name]) <= 1.5 * error(usual[name], true[name]) + floor, (name, chunk)


def test_weight_gradient_of_many_chunks_is_accumulated_in_float32() -> None:
    hidden, weight, target = inputs(320, 5, torch.bfloat16)
    hidden = hidden.abs()  # the same sign everywhere: a sum that bfloat16 could not carry on beyond 256 terms
    target = torch.zeros_like(target)
    weight = torch.zeros_like(weight)
    true = truth(hidden, weight, target, 1.0)["d both / d weight"]
    found = run(in_chunks(1), hidden, weight, target, 1.0)["d both / d weight"]
    assert error(found, true) <= 0.01 * float(true.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
def test_slopes_of_any_size_cost_nothing_in_16_bits(dtype: torch.dtype, size: float) -> None:
    """Of the weight's gradient alone, which is held in float32: that of the states has their own 16 bits."""
    hidden, weight, target = inputs(64, 515, dtype)
    true = truth(hidden, weight, target, 1.0)

    def scaled(h: Tensor, w: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, ...]:
        logp, entropy = linear_logprob(h * 1.0, Head(w.float() * 1.0), y, temperature, chunk=5)
        return tuple(_Scaled.apply(x, size) for x in (logp, entropy))

    found = run(scaled, hidden, weight.float(), target, 1.0)
    for name in (n for n in found if n.endswith("weight")):
        assert error(found[name] / size, true[name]) <= 6 * torch.finfo(dtype).eps * float(true[name].norm()), name


class _Scaled(torch.autograd.Function):
    """The same value, with a slope as large as one likes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, size: float) -> Tensor:
        ctx.size = size
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.size, None


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradcheck(chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 4, 2, 1, 3])
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, Head(w), target, 1.3, chunk=chunk), (hidden, weight))


@pytest.mark.parametrize("output", [0, 1], ids=["logp", "entropy"])
def test_second_derivatives_are_refused(output: int) -> None:
    """The backward pass reads saved normalisers as constants, so a second derivative through it would be wrong."""
    hidden, weight, target = inputs(3, 5, torch.float64)
    hidden.requires_grad_()
    value = linear_logprob(hidden, Head(weight), target)[output].square().sum()
    (slope,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.square().sum(), hidden)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_tied_head_gets_the_sum_of_both_gradients(chunk: int | None) -> None:
    _, table, target = inputs(7, 37, torch.float64)
    ids = torch.tensor([3, 3, 36, 0, 1, 2, 3])

    def gradient(operator: Operator, tied: bool) -> tuple[Tensor, ...]:
        embedding = table.clone().requires_grad_()
        head = embedding if tied else table.clone().requires_grad_()
        logp, entropy = operator(torch.tanh(embedding[ids]), head, target, 1.5)
        return torch.autograd.grad(logp.sum() + 0.5 * entropy.sum(), (embedding,) if tied else (embedding, head))

    (tied,) = gradient(in_chunks(chunk), tied=True)
    parts = gradient(in_chunks(chunk), tied=False)
    torch.testing.assert_close(tied, parts[0] + parts[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tied, gradient(logits_at_once, tied=True)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_planted_peaks(chunk: int | None, dtype: torch.dtype) -> None:
    """Logits of 0 but for one of 10^4 in each row: exactly one-hot, whatever the target is."""
    hidden = 100 * torch.eye(3, HEAD, dtype=dtype)
    weight = torch.zeros(37, HEAD, dtype=dtype)
    weight[[5, 11, 20], [0, 1, 2]] = 100
    target = torch.tensor([5, 11, 7])  # the last one asks for a word that is not the peak
    found = run(in_chunks(chunk), hidden, weight, target, 1.0)
    height = float(hidden[0, 0] * weight[5, 0])
    assert found["logp"].tolist() == [0, 0, -height]
    assert found["entropy"].tolist() == [0, 0, 0]
    assert not found["d entropy / d hidden"].any()
    assert not found["d entropy / d weight"].any()
    # d logp / d logits of row 2 is onehot(7) - onehot(20), times its slope of 0.9; rows 0 and 1 have none.
    wanted = torch.zeros(37, HEAD, dtype=torch.float64)
    wanted[7], wanted[20] = 0.9 * hidden[2].double(), -0.9 * hidden[2].double()
    torch.testing.assert_close(found["d logp / d weight"].double(), wanted, rtol=4e-3, atol=0)
    assert not found["d logp / d hidden"][:2].any()
    torch.testing.assert_close(found["d logp / d hidden"][2].double(), -0.9 * weight[20].double(), rtol=4e-3, atol=0)


def confident(height: float) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 inputs whose logits are `height` for the target and 0 for two other words."""
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    weight[1, 0] = round(height)
    weight[1, 1] = height - round(height)
    return hidden, weight, torch.tensor([1])


def test_a_confident_tokens_gradient_keeps_its_digits() -> None:
    """p - 1 is 0.0018; of p rounded to bfloat16 first, 0.002 or nothing would be left."""
    hidden, weight, target = confident(7.0)
    found = run(in_chunks(None), hidden, weight, target, 1.0)
    true = truth(hidden, weight, target, 1.0)
    for name in ("d logp / d hidden", "d logp / d weight"):
        assert error(found[name], true[name]) <= 0.01 * float(true[name].norm()), name


def test_the_targets_own_logit_is_not_rounded() -> None:
    """20.0625 would become 20.0 or 20.125 in bfloat16: log p of a word at 0 feels nothing, the target's all of it."""
    hidden, weight, _ = confident(20.0625)
    weight[2, 0] = 20
    logp, _ = linear_logprob(hidden, Head(weight), torch.tensor([1]))
    wanted, _ = logits_at_once(hidden.double(), weight.double(), torch.tensor([1]), 1.0)
    assert abs(float(logp) - float(wanted)) < 1e-4


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_impossible_tokens_are_absent_tokens(temperature: float, chunk: int | None) -> None:
    """A logit of -inf: probability, entropy and gradient as if the word were struck from the vocabulary."""
    hidden, weight, _ = inputs(7, 37, torch.float64)
    hidden[:, 0] = 1
    ruled_out = torch.tensor([0, 17, 36])
    left = torch.tensor([i for i in range(37) if i not in ruled_out.tolist()])
    weight[ruled_out] = 0
    weight[ruled_out, 0] = -torch.inf
    target = torch.arange(7)
    weight.requires_grad_()
    logp, entropy = linear_logprob(hidden, Head(weight), left[target], temperature, chunk=chunk)
    (logp.sum() + 0.5 * entropy.sum()).backward()
    shorter = weight.detach()[left].requires_grad_()
    wanted_logp, wanted_entropy = logits_at_once(hidden, shorter, target, temperature)
    (wanted_logp.sum() + 0.5 * wanted_entropy.sum()).backward()
    torch.testing.assert_close(logp, wanted_logp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, wanted_entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad[left], shorter.grad, rtol=1e-10, atol=1e-12)
    assert not weight.grad[ruled_out].any()
    with torch.no_grad():
        impossible, _ = linear_logprob(hidden[:1], Head(weight), ruled_out[:1], temperature, chunk=chunk)
    assert impossible.tolist() == [-math.inf]


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as seen:
        yield seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("chunk", [7, None])
def test_never_holds_the_logits(chunk: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    t, v = 180, 515
    hidden, weight, target = inputs(t, v, dtype)
    limit = 8 * v
    monkeypatch.setattr(chunk_logits, "CHUNK_BYTES", {"cpu": limit * dtype.itemsize})
    allowed = max(v * HEAD, t * HEAD, limit)
    assert allowed < t * v / 10
    with largest() as seen:
        run(in_chunks(chunk), hidden, weight.float(), target, 1.5)
    assert 0 < seen.numel <= allowed
    with largest() as seen:
        run(logits_at_once, hidden, weight.float(), target, 1.5)
    assert seen.numel >= t * v  # the hook sees what it should


def test_saved_for_backward_is_small() -> None:
    t, v = 300, 515
    hidden, weight, target = inputs(t, v, torch.float32)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        linear_logprob(hidden.requires_grad_(), Head(weight.requires_grad_()), target, 1.5, chunk=8)
    assert sizes
    assert sum(sizes) <= t * HEAD + v * HEAD + 4 * t


@pytest.mark.parametrize("trained", ["hidden", "weight"])
@pytest.mark.parametrize("output", [0, 1], ids=["logp only", "entropy only"])
def test_one_output_and_one_input_alone(output: int, trained: str) -> None:
    hidden, weight, target = inputs(7, 37, torch.float64)
    values = {"hidden": hidden, "weight": weight}
    values[trained].requires_grad_()

    def gradient(operator: Operator) -> Tensor:
        (slope,) = torch.autograd.grad(operator(hidden, weight, target, 0.6)[output].sum(), values[trained])
        return slope

    torch.testing.assert_close(gradient(in_chunks(3)), gradient(logits_at_once), rtol=1e-10, atol=1e-12)
    linear_logprob(hidden, Head(weight), target, 0.6)[output].sum().backward()
    frozen = values["weight" if trained == "hidden" else "hidden"]
    assert values[trained].grad is not None
    assert frozen.grad is None


def test_no_graph_where_nothing_is_trained() -> None:
    hidden, weight, target = inputs(7, 37, torch.float32)
    assert not any(out.requires_grad for out in linear_logprob(hidden, Head(weight), target))
    hidden.requires_grad_()
    with torch.no_grad():
        assert not any(out.requires_grad for out in linear_logprob(hidden, Head(weight), target))


def test_no_tokens() -> None:
    hidden, weight, target = inputs(1, 37, torch.float32)
    found = run(in_chunks(None), hidden[:0], weight, target[:0], 1.0)
    assert found["logp"].shape == found["entropy"].shape == (0,)
    assert not found["d both / d weight"].any()


def test_layout_in_memory_does_not_matter() -> None:
    hidden, weight, target = inputs(7, 37, torch.float64)
    plain = run(in_chunks(3), hidden, weight, target, 1.5)
    strided = run(in_chunks(3), hidden.T.contiguous().T, weight.T.contiguous().T, target.repeat_interleave(2)[::2], 1.5)
    for name, value in plain.items():
        torch.testing.assert_close(strided[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "named"),
    [
        ((7, 16), (37, 15), (7,), ["[7, 16]", "[37, 15]"]),
        ((7, 16), (37, 16), (6,), ["[7, 16]", "[6]"]),
        ((7, 16), (37, 16), (8,), ["[7, 16]", "[8]"]),
        ((7, 16), (37, 16), (7, 1), ["[7, 1]"]),
        ((7, 16), (37, 16), (), ["target []"]),
        ((1, 7, 16), (37, 16), (1, 7), ["[1, 7, 16]"]),
        ((16,), (37, 16), (1,), ["hidden [16]"]),
    ],
)
def test_shapes_that_do_not_fit_are_named(hidden: tuple, weight: tuple, target: tuple, named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        linear_logprob(torch.zeros(hidden), Head(torch.zeros(weight)), torch.zeros(target, dtype=torch.int64))
    assert all(text in str(caught.value) for text in [*named, "[T, H], [V, H], [T]"])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(InputError, match=r"temperature=.*must be > 0"):
        linear_logprob(*in_head(7, 37), temperature)


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_out_of_range(chunk: int) -> None:
    with pytest.raises(InputError, match=rf"chunk={chunk}: must be at least 1"):
        linear_logprob(*in_head(7, 37), chunk=chunk)


@pytest.mark.parametrize("word", [37, -1, -100])
def test_target_outside_the_vocabulary_is_not_read_as_another_word(word: int) -> None:
    hidden, weight, target = inputs(7, 37, torch.float32)
    target[3] = word
    with pytest.raises(InputError, match=f"target has {word}: must be in"):
        linear_logprob(hidden, Head(weight), target)
