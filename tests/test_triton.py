"""The row kernels against a float64 truth, in triton's interpreter on the CPU, and on a CUDA GPU where there is one.

The interpreter has to be asked for before triton is imported, so those tests run in a process of their own: each
kernel, dtype and option once in a fork, and all cases in the process of `test_in_triton_s_interpreter`, slowly. What
the interpreter cannot see is asked of the compiler, which needs no GPU.

Budgets: what one rounding to the result's dtype may do to each element, and what float32's rounding of z and of the
normaliser may do, which the plain computation suffers too. logp and entropy are held to the rounding of their own size.

Not covered without a GPU: speed; rows beyond 2^31 elements (the compiled address arithmetic is looked at); a NaN that
a maximum drops there (the interpreter's keeps it); the rounding of bfloat16 (the interpreter cuts it off).
"""

import importlib
import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drpo.errors import InputError
from drpo.objectives import DPPO, DRPO, GSPO
from drpo.ops import Head, chunk_logits, chunked, linear_logprob, rows
from drpo.ops import triton as kernels
from drpo.types import TopK
from support.forks import fork
from support.head import fused

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs triton")
DTYPES = pytest.mark.parametrize("dtype", kernels.DTYPES, ids=["f32", "bf16", "f16"])
NARROW = [*kernels.DTYPES[:2], pytest.param(kernels.DTYPES[2], marks=pytest.mark.slow)]
"""Of the two narrow ones, the interpreter's cases are slow for float16 where others show its values."""
USUAL = pytest.mark.parametrize("dtype", NARROW, ids=["f32", "bf16", "f16"])
SCALES = pytest.mark.parametrize(
    "scale",
    [pytest.param(1.0, marks=pytest.mark.slow), 1 / 0.6, pytest.param(1 / 1.5, marks=pytest.mark.slow)],
    ids=["1", "1/0.6", "1/1.5"],
)
OUTS = pytest.mark.parametrize("out", NARROW, ids=["to f32", "to bf16", "to f16"])
TILE = kernels.LANES * kernels.VECTOR_BYTES // 2
"""Logits of a row that the statistics take at a time, at the most; half of it in float32."""
SHAPES = [
    (1, 1),
    (3, 1),
    (5, 5),
    (3, 37),
    (5, 1000),
    (1, kernels.BLOCK),
    (3, kernels.BLOCK + 3),
    (1, TILE),
    (3, TILE + 5),
    (2, 2 * TILE + 1),
]
EDGES = {(1, 1), (3, 1), (5, 1000), (1, kernels.BLOCK), (1, TILE)}
"""Slow in the interpreter: their neighbours show the same loops, each a little longer."""
EPS = torch.finfo(torch.float32).eps


def on(*shapes: tuple[int, int], large: bool = False) -> pytest.MarkDecorator:
    """Each shape in the interpreter and on a GPU, and there the vocabulary of Qwen3 too."""
    slow = {shape: [pytest.mark.slow] for shape in EDGES if len(shapes) > 2}
    marks = {shape: [pytest.mark.interpreted, *slow.get(shape, [])] for shape in shapes}
    cases = [pytest.param("cpu", *s, marks=marks[s], id=f"{s[0]}x{s[1]}") for s in shapes]
    wide = [(64, 151_936)] if large else []
    cases += [pytest.param("cuda", *s, marks=pytest.mark.gpu, id=f"cuda-{s[0]}x{s[1]}") for s in [*shapes, *wide]]
    return pytest.mark.parametrize(("device", "c", "v"), cases)


@pytest.fixture(autouse=True)
def _place(request: pytest.FixtureRequest) -> None:
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    if device == "cuda" and not kernels.supported("cuda"):
        pytest.skip("needs a CUDA GPU and triton")
    if device == "cpu" and not kernels.supported("cpu"):
        pytest.skip("needs TRITON_INTERPRET=1; test_in_triton_s_interpreter runs it")


def inputs(device: str, c: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of the size that models have, with some rows peaked and some flat, and targets."""
    generator = torch.Generator().manual_seed(seed + 1000 * c + v)
    spread = torch.logspace(-1, 1, c)[:, None] if c > 1 else 3.0
    logits = torch.randn(c, v, generator=generator) * spread - 2
    return logits.to(dtype).to(device), torch.randint(v, (c,), generator=generator).to(device)


def truth(logits: Tensor, target: Tensor, scale: float) -> dict[str, Tensor]:
    """Everything in float64; p - onehot with its relative accuracy: 1 - p as the sum of the others."""
    z = logits.double() * scale
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    residual = p.scatter(-1, target[:, None], -p.scatter(-1, target[:, None], 0).sum(-1, keepdim=True))
    entropy = -(torch.where(p > 0, log_p, 0) * p).sum(-1)
    logp = log_p.gather(-1, target[:, None])[:, 0]
    return {"logp": logp, "entropy": entropy, "p": p, "log_p": log_p, "residual": residual}


def rounding(logits: Tensor, scale: float) -> Tensor:
    """[C, 1]: what float32's rounding of z and of the normaliser may do to log p, in the row's own units."""
    z = logits.double() * scale
    return EPS * (8 + 2 * torch.where(z.isfinite(), z.abs(), 0).amax(-1, keepdim=True))


def assert_within(found: Tensor, true: Tensor, budget: Tensor | float) -> None:
    wrong = (found.double() - true).abs() - budget
    wrong = torch.where(found.double() == true, 0, wrong)  # equal infinities
    assert not wrong.isnan().any()
    assert (wrong <= 0).all(), f"{float(wrong.max()):.3g} over budget"


def assert_slope(found: Tensor, true: Tensor, p: Tensor, absolute: Tensor) -> None:
    """One rounding to the dtype, and the error of p. The interpreter cuts bfloat16 off instead of rounding it."""
    kind = torch.finfo(found.dtype)
    cut_off = found.dtype == torch.bfloat16 and kernels.INTERPRETED
    half_step = 0 if found.dtype == torch.float32 else kind.eps if cut_off else kind.eps / 2
    least = max(kind.smallest_normal * kind.eps, 2e-38)
    assert_within(found, true, half_step * 1.01 * true.abs() + absolute * (p + true.abs()) * 1.01 + least)


# ---- statistics ----


@SCALES
@USUAL
@on(*SHAPES, large=True)
def test_statistics(device: str, c: int, v: int, dtype: torch.dtype, scale: float) -> None:
    logits, target = inputs(device, c, v, dtype)
    true = truth(logits, target, scale)
    found = dict(zip(("logp", "entropy"), kernels.statistics(logits, target, scale), strict=True))
    row = rounding(logits, scale)[:, 0]
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.shape == (c,)
        assert_within(value, true[name], row)
    assert_within(found["logp"], true["logp"], EPS * (8 - 2 * true["logp"]))
    assert_within(found["entropy"], true["entropy"], 16 * EPS * (1 + true["entropy"]))


@DTYPES
@on((3, 37), (2, TILE + 5), large=True)
def test_all_logits_equal(device: str, c: int, v: int, dtype: torch.dtype) -> None:
    logits = torch.tensor([-1e4, 0.0, 1e4], device=device).to(dtype)[torch.arange(c) % 3, None].repeat(1, v)
    logp, entropy = kernels.statistics(logits, torch.arange(c, device=device), 1 / 0.6)
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(v)), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(v)), rtol=1e-6, atol=0)


@SCALES
@pytest.mark.parametrize("offset", [-1e4, 1e4])
@on((3, 37), (3, kernels.BLOCK + 3))
def test_a_constant_added_to_all_logits_costs_nothing(device: str, c: int, v: int, offset: float, scale: float) -> None:
    """The truth has the shifted logits too, so what rounding them costs does not count."""
    logits, target = inputs(device, c, v)
    shifted = logits + offset
    true = truth(shifted, target, scale)
    residual, logp, entropy = kernels.residual(shifted.clone(), target, scale, torch.float32)
    assert_within(logp, true["logp"], 8 * EPS * (1 - true["logp"]))
    assert_within(entropy, true["entropy"], 16 * EPS * (1 + true["entropy"]))
    assert_slope(residual, true["residual"], true["p"], rounding(shifted, scale))


@USUAL
@on((3, 37), (3, TILE + 5), (2, 3 * TILE))
def test_impossible_tokens(device: str, c: int, v: int, dtype: torch.dtype) -> None:
    """Logits of -inf: the first half of a row, the second half, all but one; whole tiles of them where V allows."""
    logits, _ = inputs(device, c, v, dtype)
    half = v // 2
    logits[0, :half], logits[1, half:] = -math.inf, -math.inf
    logits[2:, :-1] = -math.inf
    target = torch.full((c,), v - 1, device=device)
    true = truth(logits, target, 1 / 0.6)
    residual, logp, entropy = kernels.residual(logits.clone(), target, 1 / 0.6, torch.float32)
    row = rounding(logits, 1 / 0.6)
    assert logp[1] == -math.inf
    assert_within(logp, true["logp"], row[:, 0])
    assert_within(entropy, true["entropy"], row[:, 0])
    assert (logp[2:] == 0).all()
    assert (entropy[2:] == 0).all()
    assert_slope(residual, true["residual"], true["p"], row)
    assert (residual[0, :half] == 0).all()
    ones = torch.ones(c, device=device)
    both = kernels.slope(logits, target, 1 / 0.6, ones, ones, torch.float32)
    assert both.isfinite().all()
    assert (both[0, :half] == 0).all()


@on((5, 37), (5, TILE + 5))
def test_a_nan_is_not_lost(device: str, c: int, v: int) -> None:
    logits, target = inputs(device, c, v)
    logits[1, v - 1], logits[3, 0] = math.nan, math.nan
    residual, _, entropy = kernels.residual(logits, target - target + v // 2, 1.0, torch.float32)
    assert entropy.isnan().tolist() == [False, True, False, True, False]
    assert residual.isnan().all(-1).tolist() == entropy.isnan().tolist() == residual.isnan().any(-1).tolist()


@on((4, 37))
def test_a_target_outside_the_vocabulary_is_not_read_as_another_word(device: str, c: int, v: int) -> None:
    logits, _ = inputs(device, c, v)
    logp, entropy = kernels.statistics(logits, torch.tensor([0, v, -1, v - 1], device=device), 1.0)
    assert logp.isnan().tolist() == [False, True, True, False]
    assert entropy.isfinite().all()


@on((25, 37), (5, TILE + 5))
def test_entropy_is_never_negative_nor_logp_positive(device: str, c: int, v: int) -> None:
    logits, _ = inputs(device, c, v)
    logits = logits * torch.logspace(-2, 2, c, device=device)[:, None] + 300
    logp, entropy = kernels.statistics(logits, logits.argmax(-1), 1 / 0.6)
    assert (entropy >= 0).all()
    assert (logp <= 0).all()
    assert (entropy < 1e-3).any()


# ---- slopes ----


@SCALES
@OUTS
@USUAL
@on(*SHAPES, large=True)
def test_residual(device: str, c: int, v: int, dtype: torch.dtype, out: torch.dtype, scale: float) -> None:
    logits, target = inputs(device, c, v, dtype)
    true = truth(logits, target, scale)
    row = rounding(logits, scale)
    statistics = kernels.statistics(logits.clone(), target, scale)
    found, *figures = kernels.residual(logits, target, scale, out)
    assert found.dtype == out
    assert (found.data_ptr() == logits.data_ptr()) == (out == dtype)
    assert_slope(found, true["residual"], true["p"], row)
    assert all(torch.equal(a, b) for a, b in zip(figures, statistics, strict=True))
    if out == torch.float32:
        assert_within(found.double().sum(-1), torch.zeros_like(true["logp"]), 2 * row[:, 0])


@DTYPES
@on((3, 37), (3, TILE + 5), large=True)
def test_peaks_keep_the_relative_accuracy_of_p_minus_one(device: str, c: int, v: int, dtype: torch.dtype) -> None:
    """A target's p of 1 - 1e-2 to 1 - 1e-4, where the rounded p is 1 and its difference from 1 would be nothing."""
    logits, target = inputs(device, c, v, dtype)
    logits = (logits / 8).round() / 8  # few digits, so that the peak's height is a number of this dtype
    gap = torch.linspace(5, 9, c, device=device).round() + math.ceil(math.log(v))
    logits.scatter_(-1, target[:, None], (logits.float().amax(-1).ceil() + gap)[:, None].to(dtype))
    true = truth(logits, target, 1.0)
    wanted = true["residual"].gather(-1, target[:, None])
    assert ((wanted < -1e-7) & (wanted > -2e-2)).all()
    found = kernels.residual(logits.clone(), target, 1.0, dtype)[0].gather(-1, target[:, None])
    row = rounding(logits, 1.0)
    step = torch.finfo(dtype).eps
    assert_within(found, wanted, step * wanted.abs() + row)
    if dtype == torch.bfloat16:  # and the check can fail
        rounded = true["p"].to(dtype).gather(-1, target[:, None]) - 1
        assert ((rounded.double() - wanted).abs() > step * wanted.abs() + row).any()


@SCALES
@USUAL
@on((3, 1), (5, 37), (3, kernels.BLOCK + 3), (3, TILE + 5), large=True)
def test_slope(device: str, c: int, v: int, dtype: torch.dtype, scale: float) -> None:
    logits, target = inputs(device, c, v, dtype)
    true = truth(logits, target, scale)
    grads = torch.stack([torch.linspace(-1.3, 0.9, c), torch.linspace(0.7, -0.4, c)]).to(device)
    grads[0, -1] = 0
    z = (logits.double() * scale).requires_grad_()
    log_p = torch.log_softmax(z, dim=-1)
    outputs = log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (wanted,) = torch.autograd.grad((grads[0] * outputs[0] + grads[1] * outputs[1]).sum(), z)
    row = rounding(logits, scale)
    size = true["p"] * (1 + true["log_p"].abs() + true["entropy"][:, None])
    size.scatter_add_(-1, target[:, None], -true["residual"].gather(-1, target[:, None]))
    for out in kernels.DTYPES:
        given = logits.clone()
        found = kernels.slope(given, target, scale, *grads, out)
        assert found.dtype == out
        assert (found.data_ptr() == given.data_ptr()) == (out == dtype)
        assert_slope(found, wanted, 2 * size, row)


@on((4, 37))
def test_without_a_gradient_in_the_entropy_it_is_the_residual(device: str, c: int, v: int) -> None:
    """The gradients come from a sum, as views with a stride of 0; the residual is the gradient of -logp."""
    logits, target = inputs(device, c, v)
    minus, zero = torch.tensor([-1.0, 0.0], device=device)[:, None].expand(2, c)
    both = kernels.slope(logits.clone(), target, 1 / 0.6, minus, zero, torch.float32)
    assert torch.equal(both, kernels.residual(logits, target, 1 / 0.6, torch.float32)[0])


# ---- memory ----


@USUAL
@pytest.mark.parametrize("pad", [1, pytest.param(16, marks=pytest.mark.slow)])
@on((1, 5), (3, 37), (3, kernels.BLOCK + 3), (3, TILE + 5))
def test_rows_that_lie_apart(device: str, c: int, v: int, pad: int, dtype: torch.dtype) -> None:
    """What lies between the rows is neither read nor written: it is NaN before, and afterwards."""
    logits, target = inputs(device, c, v, dtype)
    stride = (v // 16 + 1) * 16 + pad
    wide = torch.full((c, stride), math.nan, dtype=dtype, device=device)
    wide[:, :v] = logits
    close = kernels.statistics(logits, target, 1.0)
    target = target.repeat_interleave(2)[::2]
    apart = kernels.statistics(wide[:, :v], target, 1.0)
    for a, b in zip(close, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    ones = torch.ones(c, device=device)
    for out in {torch.float32, dtype}:
        close = {"rtol": torch.finfo(out).eps, "atol": 1e-6}
        wanted = kernels.residual(logits.clone(), target, 1.0, out)[0]
        torch.testing.assert_close(kernels.residual(wide[:, :v], target, 1.0, out)[0], wanted, **close)
        wide[:, :v] = logits
        torch.testing.assert_close(kernels.slope(wide[:, :v], target, 1.0, -ones, 0 * ones, out), wanted, **close)
        wide[:, :v] = logits
        assert wide[:, v:].isnan().all()


@on((0, 37))
def test_no_rows(device: str, c: int, v: int) -> None:
    logits, target = inputs(device, 1, v)
    none = kernels.statistics(logits[:c], target[:c], 1.0)
    assert [x.shape for x in none] == [(0,)] * 2
    assert kernels.residual(logits[:c], target[:c], 1.0, torch.bfloat16)[0].shape == (0, v)
    assert kernels.slope(logits[:c], target[:c], 1.0, *none, torch.bfloat16).shape == (0, v)


@pytest.mark.parametrize(("device", "v"), [pytest.param("cuda", 151_936, marks=pytest.mark.gpu)])
def test_rows_beyond_two_to_the_31(device: str, v: int) -> None:
    c = 2**31 // v + 66
    if torch.cuda.mem_get_info()[0] < 5 * c * v:
        pytest.skip(f"needs {5 * c * v / 1e9:.0f} GB of GPU memory")
    logits = torch.randn(c, v, device=device, dtype=torch.bfloat16)
    target = torch.randint(v, (c,), device=device)
    last = logits[-64:].clone()
    found = [x[-64:] for x in kernels.residual(logits, target, 1.0, torch.bfloat16)]
    for a, b in zip(found, kernels.residual(last, target[-64:], 1.0, torch.bfloat16), strict=True):
        torch.testing.assert_close(a, b)


# ---- behind the head operator ----

FUNCTIONS = ("statistics", "residual", "slope")
USED = {
    "logprob": ["statistics", "residual"],
    "logprob with entropy": ["statistics", "slope"],
    "policy loss": ["residual"],
    "policy loss by divergence": ["residual"],
    "policy loss of sequences": ["statistics", "residual"],
}
"""What each operator asks of each chunk, forward and then backward."""


def run_operator(operator: str, device: str, t: int, v: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output of an operator, and the gradients in hidden and weight."""
    generator = torch.Generator().manual_seed(t + v)
    hidden, weight = (torch.randn(n, 16, generator=generator).div(2).to(dtype).to(device) for n in (t, v))
    hidden.requires_grad_()
    weight.requires_grad_()
    target = torch.randint(v, (t,), generator=generator).to(device)
    slope = torch.linspace(-1.3, 0.9, t, device=device)
    if operator.startswith("logprob"):
        logp, entropy = linear_logprob(hidden, Head(weight), target, 0.6, chunk=3)
        loss = (slope * logp).sum() + (0.3 * entropy.sum() if "entropy" in operator else 0)
        found = {"logp": logp, "entropy": entropy}
    else:
        columns = {
            "behavior_logp": torch.full((t,), -math.log(v) - 1, device=device),
            "advantage": slope,
            "keep": torch.ones(t, dtype=torch.bool, device=device),
            "sequence": torch.arange(t, device=device) // 2,
            "token_weight": slope.abs() + 0.1,
        }
        objective = GSPO() if "sequences" in operator else DRPO(0.2)
        top = None
        if "divergence" in operator:
            objective = DPPO(0.3, divergence="topk_kl")
            top_logp, ids = torch.randn(t, v, generator=generator).log_softmax(-1).topk(5)
            top = TopK(ids, top_logp).to(torch.device(device))
        result = fused(hidden, weight, target, objective, **columns, top_logprobs=top, temperature=0.6, chunk=3)
        loss = result.loss
        found = {name: v for name, v in vars(result).items() if isinstance(v, Tensor)}
    loss.backward()
    found |= {"loss": loss, "d hidden": hidden.grad, "d weight": weight.grad}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize("operator", USED)
@on((7, 37), (4, TILE + 5))
def test_the_head_operator_says_the_same_with_either_backend(
    device: str, c: int, v: int, operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are asked for float32 logits, which rounded inputs have on a GPU alone, and for no others."""
    asked: list[str] = []

    def noting(name: str, function: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (asked.append(name), function(*arguments))[1]

    for name in FUNCTIONS:
        monkeypatch.setattr(kernels, name, noting(name, getattr(kernels, name)))
    found = run_operator(operator, device, c, v, dtype)
    wide = dtype == torch.float32 or (dtype == torch.bfloat16 and device == "cuda")
    n_chunks = -(-c // 3)
    assert asked == [name for name in USED[operator] for _ in range(n_chunks)] * wide
    monkeypatch.setattr(kernels, "supported", lambda device: False)
    asked.clear()
    wanted = run_operator(operator, device, c, v, dtype)
    assert not asked
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert value.any(), name
        each = 32 * torch.finfo(value.dtype).eps
        budget = each * (float(value.abs().max()) + value.double().abs())
        assert_within(found[name], value.double(), budget)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_backends_are_called_alike(name: str) -> None:
    here, there = (list(inspect.signature(getattr(m, name)).parameters) for m in (kernels, rows))
    assert here == [parameter for parameter in there if parameter != "exact"]


PLAIN = chunk_logits.HeadOptions(scale=1.0, soft_cap=None, temperature=1.0, chunk=None, auxiliary=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_rounded_inputs_have_wide_logits_on_cuda(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types alone, which needs no GPU."""
    monkeypatch.setattr(chunk_logits, "CHUNK_BYTES", {"cuda": 8 * 37 * 4})
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 16, dtype=dtype, device="cuda") for n in (64, 37))
        target = torch.empty(8, 1, dtype=torch.int64, device="cuda")
        shape = chunk_logits.ChunkedHead.of(hidden, weight, None, PLAIN)
        logits, exact = shape.linear(torch.empty(8, 16, dtype=dtype, device="cuda"), target)
    assert shape.chunk == 8
    assert shape.buffer is None
    assert logits.shape == (8, 37)
    assert logits.dtype == torch.float32
    assert not exact


@pytest.mark.parametrize(("device", "v"), [pytest.param("cuda", 8197, marks=pytest.mark.gpu)])
def test_wide_logits_keep_their_digits(device: str, v: int) -> None:
    hidden, weight = (torch.randn(n, 256, device=device).to(torch.bfloat16) for n in (64, v))
    head = chunk_logits.ChunkedHead.of(hidden, weight, None, PLAIN)
    logits, _ = head.linear(hidden, torch.zeros(64, 1, dtype=torch.int64))
    wanted = hidden.double() @ weight.double().T
    assert float((logits.double() - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


# ---- arguments ----


@on((3, 37))
def test_arguments_that_do_not_fit_are_named(device: str, c: int, v: int) -> None:
    logits, target = inputs(device, c, v)
    zeros = torch.zeros(c, device=device)
    for wrong, named in [
        (lambda: kernels.statistics(logits[0], target, 1.0), r"logits \[37\]"),
        (lambda: kernels.statistics(logits[:, ::2], target, 1.0), "neighbours in memory"),
        (lambda: kernels.statistics(logits.double(), target, 1.0), "float64"),
        (lambda: kernels.statistics(logits, target[:2], 1.0), r"target \[2\].*must be \[3\]"),
        (lambda: kernels.statistics(logits, target.int(), 1.0), "target.*int32"),
        (lambda: kernels.statistics(logits, target, 0.0), "scale=0.0"),
        (lambda: kernels.residual(logits, target, math.nan, torch.float32), "scale=nan"),
        (lambda: kernels.residual(logits, target, 1.0, torch.float64), "result torch.float64"),
        (lambda: kernels.slope(logits, target, 1.0, zeros.double(), zeros, torch.float32), "grad_logp.*float64"),
        (lambda: kernels.slope(logits, target, 1.0, zeros, zeros[:2], torch.float32), r"grad_entropy \[2\]"),
    ]:
        with pytest.raises(InputError, match=named):
            wrong()


@needs_triton
@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter runs on the CPU")
def test_without_a_gpu() -> None:
    assert not kernels.supported("cpu")
    assert kernels.supported("cuda") == torch.cuda.is_available()
    assert chunked._rows(torch.zeros(1, 2)) is rows
    with pytest.raises(InputError, match="triton: needs a CUDA device; the logits are on 'cpu'"):
        kernels.statistics(*inputs("cpu", 3, 37), 1.0)


def without_triton() -> None:
    sys.modules["triton"] = None  # type: ignore[assignment]
    importlib.reload(kernels)
    assert not kernels.supported("cpu") and not kernels.supported("cuda")
    assert chunked._rows(torch.zeros(1, 2)) is rows
    linear_logprob(torch.zeros(1, 3), Head(torch.ones(4, 3)), torch.tensor([2]))
    with pytest.raises(InputError, match=r"^triton: needs the package `triton`, which is not installed$"):
        kernels.statistics(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 1.0)


def test_without_triton(one_thread: None, tmp_path: Path) -> None:
    status, said = fork(tmp_path / "said", without_triton).end()
    assert status == 0, said


# ---- the interpreter, the compiler ----


def interpret_short_rows() -> None:
    """Each kernel, each dtype and each option in a test of short rows, called without pytest."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if re.match(r"triton(\.(?!_C)|$)", name)]:  # what is in C stays
        del sys.modules[name]
    importlib.reload(kernels)
    assert kernels.supported("cpu")
    short = ("cpu", 3, 37)
    f32, bf16, f16 = kernels.DTYPES
    for dtype, scale in ((f32, 1 / 0.6), (bf16, 1.0)):
        test_statistics(*short, dtype, scale)
        test_slope(*short, dtype, scale)
    for dtype, out in ((f32, f32), (f32, bf16), (bf16, bf16)):
        test_residual(*short, dtype, out, 1 / 0.6)
    test_all_logits_equal(*short, f16)
    test_peaks_keep_the_relative_accuracy_of_p_minus_one(*short, bf16)
    test_a_constant_added_to_all_logits_costs_nothing(*short, 1e4, 1 / 0.6)
    test_impossible_tokens(*short, f32)
    test_a_nan_is_not_lost("cpu", 5, 37)
    test_a_target_outside_the_vocabulary_is_not_read_as_another_word("cpu", 4, 37)
    test_entropy_is_never_negative_nor_logp_positive("cpu", 9, 37)
    test_without_a_gradient_in_the_entropy_it_is_the_residual(*short)
    test_rows_that_lie_apart(*short, 1, f32)
    test_no_rows("cpu", 0, 37)
    test_arguments_that_do_not_fit_are_named(*short)
    for operator in USED:
        with pytest.MonkeyPatch.context() as patch:
            test_the_head_operator_says_the_same_with_either_backend("cpu", 4, 37, operator, f32, patch)


@needs_triton
def test_short_rows_in_triton_s_interpreter(one_thread: None, tmp_path: Path) -> None:
    status, said = fork(tmp_path / "said", interpret_short_rows).end()
    assert status == 0, said


@needs_triton
@pytest.mark.slow
def test_in_triton_s_interpreter() -> None:
    """Run this file's tests marked `interpreted`, none of which may be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
    done = subprocess.run(
        [*command, "--maxfail=3", "-m", "interpreted", str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,  # hung, and not slow
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


TYPES = dict.fromkeys(["normaliser", "entropy", "logp", "grad_logp", "grad_entropy"], "*fp32")
TYPES |= {"target": "*i64", "row_stride": "i32", "result_stride": "i32", "size": "i32", "scale": "fp32"}


@needs_triton
@pytest.mark.skipif(kernels.INTERPRETED, reason="interpreted kernels cannot be compiled")
@pytest.mark.parametrize(
    ("name", "logits", "out", "wide_products"),
    [
        ("_statistics", "bf16", "", 1),
        ("_residual", "fp32", "bf16", 2),
        ("_slope", "fp32", "fp32", 2),
        pytest.param("_statistics", "fp32", "", 1, marks=pytest.mark.slow),
        pytest.param("_residual", "bf16", "bf16", 2, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_hopper(
    name: str, logits: str, out: str, wide_products: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled without a GPU: rows are addressed in 64 bits, and results rounded to the nearest."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    width = 4 if logits == "fp32" else 8
    constants = {"lanes": kernels.LANES, "width": width, "block": kernels.BLOCK}
    types = {**TYPES, "logits": f"*{logits}", "result": f"*{out}", **dict.fromkeys(constants, "constexpr")}
    aligned = {n for n in kernel.arg_names if types[n].startswith("*") or types[n] == "i32"}
    source = ASTSource(
        kernel,
        signature={n: types[n] for n in kernel.arg_names},
        constexprs={(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert len(re.findall(r"arith\.muli %\w+, %\w+ : i64", compiled.asm["ttir"])) == wide_products
    assert ("cvt.rn.bf16" in compiled.asm["ptx"]) == (out == "bf16")  # to the nearest
