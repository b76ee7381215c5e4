"""Frozen linear layers with weights in 4 bits (NF4), under adapters that are trained: QLoRA.

Every 64 adjacent weights of a row-major matrix are a block; a weight is held as the nearest of 16 values, in 4 bits,
and a block's largest magnitude in float32: 4.5 bits a weight. The 16 values divide a normal distribution into equal
shares. A layer computes with the numbers so held, made dense again whenever they are needed.

Source: Dettmers et al. 2023, "QLoRA: Efficient finetuning of quantized LLMs" (arXiv:2305.14314), appendix E, without
its second quantization, that of the blocks' largest magnitudes.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from drpo.errors import InputError
from drpo.model.head import measure_head
from drpo.model.precision import compute_dtype
from drpo.model.quantize import SMALLEST_SCALE, decoder_linears, stacked_experts
from drpo.model.tables import kept

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4, in units of a block's largest magnitude."""

BLOCK = 64

log = logging.getLogger("drpo")


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A tensor in NF4.

    Args:
        codes: [n * 32] uint8, for n blocks; two numbers of `VALUES` a byte, the first in the upper half.
        absmax: [n] float32, the largest magnitude of each block.
        shape: of the tensor; the last block may have zeros at its end that belong to no element.
    """

    codes: Tensor
    absmax: Tensor
    shape: torch.Size

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor's numbers, computed in float32 and rounded to `dtype`."""
        blocks = _pairs(self.codes.device)[self.codes.int()].view(-1, BLOCK).mul_(self.absmax[:, None])
        return blocks.view(-1)[: self.shape.numel()].view(self.shape).to(dtype)


@torch.no_grad()
def to_nf4(x: Tensor) -> NF4Tensor:
    """Return a tensor in NF4: each number the nearest of `VALUES` times its block's largest magnitude.

    A block with a NaN or an infinity does not stay finite.

    Args:
        x: any shape, any float dtype.

    Example:
        >>> held = to_nf4(torch.tensor([[0.5, -2.0, 0.01, 1.4]]))
        >>> held.dense(torch.float32)
        tensor([[ 0.4922, -2.0000,  0.0000,  1.4459]])
        >>> held.absmax
        tensor([2.])
    """
    flat = x.detach().float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    ratio = blocks / absmax.clamp(min=SMALLEST_SCALE)[:, None]
    values = torch.tensor(VALUES, device=x.device)
    numbers = torch.bucketize(ratio, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    return NF4Tensor(numbers[:, 0] << 4 | numbers[:, 1], absmax, x.shape)


@kept
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of every byte, [256, 2] float32."""
    values = torch.tensor(VALUES, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is held in NF4: y = x w^T + bias, grad_x = g w, with w dense for each product.

    It computes in autocast's dtype, or in x's.

    Args:
        linear: the layer to hold.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make the weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        held = to_nf4(linear.weight)
        self.codes: Tensor
        self.absmax: Tensor
        self.register_buffer("codes", held.codes, persistent=False)
        self.register_buffer("absmax", held.absmax, persistent=False)
        self._shape: Tensor | None = None

    @property
    def held(self) -> NF4Tensor:
        """The weight [out, in] in NF4."""
        return NF4Tensor(self.codes, self.absmax, torch.Size((self.out_features, self.in_features)))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A tensor [out, in] of NaN that takes no memory, for code that asks a layer for shape, dtype and device."""
        if self._shape is None or self._shape.device != self.absmax.device:
            self._shape = self.absmax.new_full((), torch.nan).expand(self.held.shape)
        return self._shape

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Return the most that the weight takes while it is made dense in `dtype`, beside what is held."""
        return self.in_features * self.out_features * (4 + (2 if dtype == torch.float32 else dtype.itemsize))

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y: Tensor = _FrozenProduct.apply(input.to(compute_dtype(input)), self.held, self.bias)  # type: ignore[no-untyped-call]
        return y

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain frozen layer with the same weight, rounded to `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.held.dense(dtype), requires_grad=False), self.bias
        return linear


class _FrozenProduct(torch.autograd.Function):
    """x [..., in], held weight [out, in], bias [out] -> x w^T + bias; nothing dense is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.held = held
        return nn.functional.linear(x, held.dense(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.held.dense(grad.dtype), None, None


def hold_base_(model: PreTrainedModel, base_precision: str) -> None:
    """Hold the weights of a model's linear layers as `base_precision` says, in place.

    Held in NF4 are the linear layers of the decoder, without routers and without those whose weight is used otherwise
    than by a call of the layer (Mamba's `dt_proj`); embeddings, head, norms and biases are not.

    Args:
        model: in float32, on any device; its adapters are added afterwards.
        base_precision: "fp32" changes nothing; "nf4".

    Raises:
        InputError: the model has no plain linear layers with weights of their own, or has stacked experts, or cannot
            read a text.
    """
    if base_precision == "fp32":
        return
    layers = _called_linears(model)
    if reason := _unlike(model, layers):
        name = type(model).__name__
        raise InputError(f"base_precision={base_precision}: {name}: {reason}; leave --base-precision out")
    squares = torch.zeros(2, dtype=torch.float64)  # of the errors, and of the weights
    for name, layer in layers:
        own, weight = NF4Linear(layer), layer.weight.detach()
        error = own.held.dense(torch.float32) - weight
        squares += torch.stack([error.square().sum(), weight.square().sum()]).double().cpu()
        model.set_submodule(name, own)
    n = sum(layer.in_features * layer.out_features for _, layer in layers)
    log.info(
        "base_precision=nf4: %s weights of %d layers take %.2f GiB, not %.2f; rounded by %.1f %% of their size",
        f"{n:,}",
        len(layers),
        sum(x.nbytes for _, layer in held_layers(model) for x in (layer.codes, layer.absmax)) / 2**30,
        4 * n / 2**30,
        100 * float((squares[0] / squares[1]).sqrt()),
    )


def _unlike(model: PreTrainedModel, layers: Sequence[tuple[str, nn.Linear]]) -> str:
    """Return why a model's layers cannot be held; empty if they can."""
    if not layers:
        return "it has no plain linear layers"
    if any(stacked_experts(model)):
        return "the experts of a mixture are no plain linear layers"
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    shared = [name for name, layer in layers if holders[id(layer.weight)] > 1]
    return f"{shared[0]} shares its weight with another module" if shared else ""


def _called_linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    """Return the decoder's linear layers that are called when the model reads a text, and return one tensor."""
    called, layers = set[nn.Module](), decoder_linears(model)

    def note(layer: nn.Module, _: object, output: object) -> None:
        called.update([layer] if isinstance(output, Tensor) else [])

    hooks = [layer.register_forward_hook(note) for _, layer in layers]
    try:
        measure_head(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [(name, layer) for name, layer in layers if layer in called]


def held_layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """Yield the layers whose weights are held in NF4, by name.

    Args:
        model: any module.
    """
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear))


def dense_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace held layers by plain ones, in place and one by one.

    Args:
        model: with or without held layers.
        dtype: of their weights.
    """
    for name, layer in list(held_layers(model)):
        model.set_submodule(name, layer.plain(dtype))
