"""Linear layers with operands quantized to the int8 or e4m3 grid, on any machine.

Q(x) is x rounded to a grid of 8-bit values times one float32 scale per row: the row's largest magnitude over the
grid's. Rows of weights are output channels, rows of activations are tokens. bf16 represents every value of both grids,
so without an 8-bit product in hardware a bf16 product of grid values equals it, up to the order of accumulation.

This applies to the decoder's linear layers and to the weights of a mixture's stacked experts (their kernel multiplies
dense weights). The output head, embeddings, norms, biases and routers keep the compute dtype.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from drpo.errors import InputError
from drpo.model.decoder import decoder_of
from drpo.model.precision import DTYPES, Grid, Precision, compute_dtype
from drpo.model.product import product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST: Mapping[Grid, float] = {"int8": 127.0, "e4m3": 448.0}
"""The largest magnitude of each grid; int8 excludes -128, to be symmetric."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The scale of rows of zeros, so that 0 / scale is 0."""

ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")
"""Module names of the routers in transformers' mixtures of experts."""


@lru_cache
def has_e4m3_product(device: torch.device) -> bool:
    """Return whether the hardware multiplies e4m3 by e4m3 with a scale per row of each; tested once.

    False on a CPU: its `_scaled_mm` returns the same numbers, but is slower than a bf16 product.
    """
    if device.type != "cuda":
        return False
    ones = QuantizedTensor(torch.ones(16, 16, device=device).to(torch.float8_e4m3fn), torch.ones(16, 1, device=device))
    try:
        return bool((multiply(ones.values, ones.scale, ones, None, torch.bfloat16) == 16).all())
    except RuntimeError:  # below compute capability 8.9, and where this torch has no kernel for it
        return False


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as grid values times a scale per row.

    Args:
        values: [..., R, C], grid values in any dtype that represents them all.
        scale: [..., R, 1] float32; [..., 1, C] where columns are the output channels.
    """

    values: Tensor
    scale: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return values times scale, rounded to `dtype`."""
        return (self.values.float() * self.scale).to(dtype)


def to_grid(x: Tensor, grid: Grid, dtype: torch.dtype = torch.float32, dim: int = -1) -> QuantizedTensor:
    """Return Q(x): each row over its scale, rounded to the nearest value of the grid, ties to even.

        scale = max |row| / largest of the grid,    values = round(row / scale)

    No value exceeds the grid's largest, so nothing saturates. A row with a NaN or an infinity becomes all NaN.

    Args:
        x: [..., R, C], any float dtype.
        grid: "int8" or "e4m3".
        dtype: the dtype of the values: float32, bfloat16, or that of the grid; in int8 the scale alone is NaN.
        dim: the dimension that one scale spans.

    Example:
        >>> q = to_grid(torch.tensor([[0.1, -12.7, 0.0], [0.0, 0.0, 0.0]]), "int8")
        >>> q.values, q.scale[0]
        (tensor([[   1., -127.,    0.],
                [   0.,    0.,    0.]]), tensor([0.1000]))

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv:2209.05433): e4m3 has 3 bits of mantissa,
    no infinity, and a largest value of 448.
    """
    wide = x.float()
    scale = (wide.abs().amax(dim, keepdim=True) / LARGEST[grid]).clamp(min=SMALLEST_SCALE)
    if dtype == torch.int8:  # which has no NaN
        scale = scale.where(scale.isfinite(), math.nan)
    ratio = wide / scale
    values = ratio.round() if grid == "int8" else ratio.to(torch.float8_e4m3fn)
    return QuantizedTensor(values.to(dtype), scale)


def multiply(x: Tensor, x_scale: Tensor | None, w: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x w^T + bias in `dtype`: sums of products with grid values, then scaled in float32.

    On a CPU the sums are rounded to x's dtype before scaling: its bf16 product returns bf16.

    Args:
        x: [T, in], numbers or grid values.
        x_scale: [T, 1] float32 of grid values, or None.
        w: [out, in].
        bias: [out] or None.
        dtype: of the result, [T, out].

    Example:
        >>> w = to_grid(torch.tensor([[0.5, 1.27]]), "int8", torch.int8)
        >>> multiply(torch.tensor([[1.0, 0.0]]), None, w, None, torch.float32)
        tensor([[0.5000]])
    """
    if x_scale is not None and w.values.dtype == torch.float8_e4m3fn:
        return torch._scaled_mm(x, w.values.T, scale_a=x_scale, scale_b=w.scale.T, bias=bias, out_dtype=dtype)
    y = _sums(x, w.values) * w.scale.T  # float32, by promotion
    if x_scale is not None:
        y *= x_scale
    if bias is not None:
        y += bias
    return y.to(dtype)


def _sums(x: Tensor, values: Tensor) -> Tensor:
    """Return x [T, in] values^T, [T, out], in float32 where the hardware returns it, else in x's dtype."""
    if values.dtype == torch.int8:
        return product(x, values)
    values = values.to(x.dtype)
    wide = x.is_cuda and x.dtype != torch.float32
    return torch.mm(x, values.T, out_dtype=torch.float32) if wide else x @ values.T


def _held_by_a_sampler(dtype: torch.dtype, weights: Grid, activations: Grid | None, weight: Tensor) -> torch.dtype:
    """Return the dtype of a sampler's grid values: int8 on a CPU that computes in float32, else as in training.

    Where a CPU multiplies bf16, a product of many rows takes less time than the conversion of int8 would.
    """
    if weights == "int8" and activations is None and dtype == torch.float32 and weight.device.type == "cpu":
        return torch.int8
    return _held_in(dtype, activations, weight)


def _held_in(dtype: torch.dtype, activations: Grid | None, weight: Tensor) -> torch.dtype:
    """Return the dtype of a layer's grid values: e4m3 where the hardware multiplies it, else `dtype`."""
    fits = activations == "e4m3" and dtype == torch.bfloat16 and all(n % 16 == 0 for n in weight.shape)
    return torch.float8_e4m3fn if fits and has_e4m3_product(weight.device) else dtype


def _inputs(x: Tensor, grid: Grid | None, held_in: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return values [T, in] and scales [T, 1] of x [T, in] on a grid; x and None without a grid."""
    if grid is None:
        return x, None
    q = to_grid(x, grid, held_in)
    return q.values, q.scale


class QuantizedLinear(nn.Module):
    """A sampler's linear layer with a quantized weight: y = Q(x) Q(w)^T + bias, or x Q(w)^T + bias.

    Args:
        linear: the layer to quantize.
        weights: grid of the weight.
        activations: grid of the inputs, or None.
        dtype: the dtype of inputs and outputs.
    """

    def __init__(self, linear: nn.Linear, weights: Grid, activations: Grid | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights, self.activations = weights, activations
        held = torch.empty_like(linear.weight, dtype=_held_by_a_sampler(dtype, weights, activations, linear.weight))
        self.weight = nn.Parameter(held, requires_grad=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.empty(len(held), 1, device=held.device), persistent=False)
        self.bias = linear.bias
        self.load_weight(linear.weight)

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Quantize a new weight [out, in]."""
        q = to_grid(weight.to(self.weight.device), self.weights, self.weight.dtype)
        self.weight.copy_(q.values)
        self.scale.copy_(q.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in x's dtype."""
        values, scale = _inputs(x.flatten(0, -2), self.activations, self.weight.dtype)
        y = multiply(values, scale, QuantizedTensor(self.weight, self.scale), self.bias, x.dtype)
        return y.view(*x.shape[:-1], -1)


@contextmanager
def unrounded_inputs(model: nn.Module) -> Iterator[None]:
    """Do not quantize the inputs of a sampler's linear layers, to compare two computations of the same numbers.

    Inputs that differ in their last bit may round to different grid values, and more so in each later layer: the logits
    of two computations that agree to 2e-6 in float32 differed by 2 to 6 % of their spread under fp8 (SmolLM2-135M).
    """
    rounding = [(m, m.activations) for m in model.modules() if isinstance(m, QuantizedLinear)]
    for layer, _ in rounding:
        layer.activations = None
    try:
        yield
    finally:
        for layer, grid in rounding:
            layer.activations = grid


_ROUNDED: ContextVar[bool] = ContextVar("rounded", default=True)


@contextmanager
def unrounded() -> Iterator[None]:
    """Do not quantize weights and inputs of any model in training.

    With a grid, an adapter beside a rounded weight differs from the rounded sum of both, and so do rounded inputs (see
    `unrounded_inputs`). Without a grid, the model in training and its saved folder compute the same function.
    """
    before = _ROUNDED.set(False)
    try:
        yield
    finally:
        _ROUNDED.reset(before)


class StraightThroughLinear(nn.Linear):
    """A linear layer in training: the quantized product of its master weight, with the gradient of the identity for Q.

        y = Q(x) Q(w)^T + bias,    grad_x = g Q(w),    grad_w = g^T Q(x)

    It computes in autocast's dtype, or in x's; the weight is quantized at every call.

    Args:
        linear: the layer whose parameters it shares.
        weights: grid of the weight.
        activations: grid of the inputs, or None.

    Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons" (arXiv:1308.3432).
    """

    def __init__(self, linear: nn.Linear, weights: Grid, activations: Grid | None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weights, self.activations = weights, activations

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if not _ROUNDED.get():
            return super().forward(input)
        x = input.flatten(0, -2).to(compute_dtype(input))
        operands = (x, self.weight, self.bias, self.weights, self.activations)
        y: Tensor = _StraightThrough.apply(*operands)  # type: ignore[no-untyped-call]
        return y.view(*input.shape[:-1], -1)


class _StraightThrough(torch.autograd.Function):
    """x [T, in], weight [out, in], bias [out] -> Q(x) Q(w)^T + bias [T, out]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weights: Grid, activations: Grid | None
    ) -> Tensor:
        w = to_grid(weight, weights, _held_in(x.dtype, activations, weight))
        values, scale = _inputs(x, activations, w.values.dtype)
        ctx.save_for_backward(values, scale, w.values, w.scale)
        ctx.weight_dtype = weight.dtype
        return multiply(values, scale, w, None if bias is None else bias.to(x.dtype), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        dtype, grad_x, grad_w = grad.dtype, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * w_scale.T).to(dtype) @ w.to(dtype)
        if ctx.needs_input_grad[1]:
            scaled = grad if x_scale is None else (grad * x_scale).to(dtype)
            grad_w = (scaled.T @ x.to(dtype)).to(ctx.weight_dtype)
        grad_bias = grad.sum(0).to(ctx.weight_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_bias, None, None


class _DenseStraightThrough(torch.autograd.Function):
    """Q(w) in a dtype, with the gradient of the identity; for weights that another kernel multiplies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid, dim: int, dtype: torch.dtype) -> Tensor:
        ctx.weight_dtype = weight.dtype
        return _dense_stack(weight, grid, dim, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.to(ctx.weight_dtype), None, None, None


def _dense_stack(weight: Tensor, grid: Grid, dim: int, dtype: torch.dtype) -> Tensor:
    """Return Q of stacked matrices as dense numbers, matrix by matrix, to avoid a float32 copy of the whole."""
    return torch.stack([to_grid(one, grid, dim=dim).dense(dtype) for one in weight])


LoadWeights = Callable[[Tensor], object]


@torch.no_grad()
def quantize_(model: "PreTrainedModel", precision: Precision) -> dict[str, LoadWeights]:
    """Convert a sampler's model to a precision, in place.

    Args:
        model: with float parameters; buffers (rotary frequencies) keep their dtype.
        precision: the new precision.

    Returns:
        Parameter name -> function that loads a new value of any float dtype; call under no_grad.

    Raises:
        InputError: the precision has a grid, and the model has no linear layer to quantize.
    """
    loaders: dict[str, LoadWeights] = {}
    if precision.weights is not None:
        for name, linear in _linears(model):
            layer = QuantizedLinear(linear, precision.weights, precision.activations, precision.dtype)
            model.set_submodule(name, layer)
            loaders[f"{name}.weight"] = layer.load_weight
        for module_name, module, field in stacked_experts(model):
            parameter = getattr(module, field)
            load = partial(_load_dense, parameter, precision.weights, _rows_of(module))
            parameter.data, wide = parameter.data.to(precision.dtype), parameter.data
            load(wide)
            loaders[f"{module_name}.{field}"] = load
    for name, parameter in model.named_parameters():
        if name not in loaders:
            parameter.data = parameter.data.to(precision.dtype)
            loaders[name] = parameter.copy_
    return loaders


def _load_dense(parameter: nn.Parameter, grid: Grid, dim: int, weight: Tensor) -> None:
    parameter.copy_(_dense_stack(weight.to(parameter.device), grid, dim, parameter.dtype))


def fake_quantize_(model: "PreTrainedModel", precision: Precision) -> None:
    """Make a model in training compute the same products as a sampler after `quantize_`; parameters do not change.

    Args:
        model: changed in place: its linear layers become `StraightThroughLinear`, under the same names.
        precision: without a grid, nothing is done.

    Raises:
        InputError: as `quantize_`.
    """
    if precision.weights is None:
        return
    for name, linear in _linears(model):
        model.set_submodule(name, StraightThroughLinear(linear, precision.weights, precision.activations))
    stacks: dict[nn.Module, list[str]] = {}
    for _, module, field in stacked_experts(model):
        stacks.setdefault(module, []).append(field)
    for module, fields in stacks.items():
        module.register_forward_pre_hook(partial(_shadow, precision.weights, fields))
        module.register_forward_hook(partial(_unshadow, fields), always_call=True)


def _shadow(grid: Grid, fields: list[str], module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Set attributes that shadow the module's parameters for one call; the parameters do not change."""
    for name in fields if _ROUNDED.get() else ():
        weight = getattr(module, name)
        dtype = compute_dtype(weight)
        vars(module)[name] = _DenseStraightThrough.apply(weight, grid, _rows_of(module), dtype)  # type: ignore[no-untyped-call]


def _unshadow(fields: list[str], module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
    for name in fields:
        vars(module).pop(name, None)


def decoder_linears(model: "PreTrainedModel") -> list[tuple[str, nn.Linear]]:
    """Return the decoder's linear layers by their names in the model, without routers.

    Args:
        model: any causal LM.
    """
    inside = set(decoder_of(model).modules())  # excludes the head
    # Subclasses are excluded: they may compute something else.
    return [(n, m) for n, m in model.named_modules() if m in inside and type(m) is nn.Linear and not ROUTER.search(n)]


def _linears(model: "PreTrainedModel") -> list[tuple[str, nn.Linear]]:
    """Return the decoder's linear layers; at least one."""
    linears = decoder_linears(model)
    if not linears:
        raise InputError(
            f"model {type(model).__name__}: it has no linear layers to put on a grid of 8 bits; "
            f"set the precision to one of {', '.join(DTYPES)}"
        )
    return linears


def stacked_experts(model: "PreTrainedModel") -> Iterator[tuple[str, nn.Module, str]]:
    """Yield a mixture's stacked weights [E, out, in]: the module's name, the module, the parameter's name in it.

    Encoders of images beside the decoder hold tables of the same rank, and are left out.
    """
    inside = set(decoder_of(model).modules())
    for name, module in model.named_modules():
        if module in inside and not isinstance(module, nn.modules.conv._ConvNd):
            for field, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    yield name, module, field


def _rows_of(module: nn.Module) -> int:
    """Return the dimension of stacked weights that a scale spans: the inputs of an output channel."""
    return -2 if getattr(module, "is_transposed", False) else -1
