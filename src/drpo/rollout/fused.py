"""A decoding step of Llama-shaped models written out: few large products, and no calls of modules in between.

A step of one row reads every weight once, and that is most of its time; the rest is the price of some forty small
operations a layer. Written out, there are fewer, in the order and with the roundings of transformers' modules, except
that a product of some rows may be summed in another order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from drpo.model.product import product
from drpo.model.quantize import QuantizedLinear, QuantizedTensor, multiply
from drpo.rollout.attention import attend
from drpo.rollout.cache import GroupCache, GroupLayer

Step = Callable[[GroupCache, Tensor, Tensor], Tensor]
"""Appends tokens [B] at positions [B] to the rows of a cache; returns the logits [B, V] of the next."""

Weight = Tensor | QuantizedTensor
"""[out, in]."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' modules of the models that `fused_step` knows."""

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
QK_NORM = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Names of a layer's parts, all of them."""


def fused_step(model: PreTrainedModel) -> Step | None:
    """Return the step of a model, or None for a model that is not known part by part.

    The weights of q, k, v and those of gate and up become adjacent rows of one tensor each. It takes the place of the
    layers' own, which become views of it: no second copy, and none that is stale.

    Args:
        model: a causal LM; computes the same as before.

    Example:
        >>> from drpo.model.loading import tiny
        >>> fused_step(tiny()[0]) is None
        False
    """
    if not _is_known(model):
        return None
    body: Any = model.model
    layers = [_Layer.of(layer) for layer in body.layers]

    def step(cache: GroupCache, token: Tensor, position: Tensor) -> Tensor:
        x = body.embed_tokens(token)
        cos, sin = body.rotary_emb(x, position[:, None])  # [B, 1, D]
        before, after = sin.chunk(2, dim=-1)
        sin = torch.cat([-before, after], dim=-1)
        for layer, kept in zip(layers, cache.layers, strict=True):
            x = layer(x, cos, sin, cache, kept)
        return _product(body.norm(x), model.lm_head.weight, model.lm_head.bias)

    return step


@dataclass(frozen=True, eq=False)
class _Layer:
    """The weights of a layer.

    Args:
        norms: weight [H] and epsilon of the norms before the attention and before the MLP.
        qk_norms: of queries and of keys, [D]; or none.
        qkv, o, gate_up, down: weight and bias, or None.
        heads, kv_heads: their numbers.
        scaling: of scores.
    """

    norms: Sequence[tuple[Tensor, float]]
    qk_norms: Sequence[tuple[Tensor, float]]
    qkv: tuple[Weight, Tensor | None]
    o: tuple[Weight, Tensor | None]
    gate_up: tuple[Weight, Tensor | None]
    down: tuple[Weight, Tensor | None]
    heads: int
    kv_heads: int
    scaling: float

    @staticmethod
    def of(layer: Any) -> "_Layer":
        """Take a layer's weights, and merge them."""
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        return _Layer(
            [_norm_of(layer.input_layernorm), _norm_of(layer.post_attention_layernorm)],
            [_norm_of(attention.q_norm), _norm_of(attention.k_norm)] if hasattr(attention, "q_norm") else [],
            merge_(attention.q_proj, attention.k_proj, attention.v_proj),
            merge_(attention.o_proj),
            merge_(mlp.gate_proj, mlp.up_proj),
            merge_(mlp.down_proj),
            len(attention.q_proj.weight) // width,
            len(attention.k_proj.weight) // width,
            attention.scaling,
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: GroupCache, kept: GroupLayer) -> Tensor:
        """Map the states [B, H] of a token to the next layer's; sin has the sign of the rotation's first half."""
        n_rows, n_turned = len(x), self.heads + self.kv_heads
        qkv = _product(_normed(x, *self.norms[0]), *self.qkv).view(n_rows, n_turned + self.kv_heads, -1)
        qk = qkv[:, :n_turned]
        if self.qk_norms:
            parts = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([_normed(part, *norm) for part, norm in zip(parts, self.qk_norms, strict=True)], dim=1)
        before, after = qk.chunk(2, dim=-1)
        qk = (qk * cos).add_(torch.cat([after, before], dim=-1).mul_(sin))
        kept.update(qk[:, self.heads :, None], qkv[:, n_turned:, None])
        query = qk[:, : self.heads].view(n_rows, self.kv_heads, -1, qk.shape[2])
        x = _product(attend(query, self.scaling, cache, kept).view(n_rows, -1), *self.o).add_(x)
        gate, up = _product(_normed(x, *self.norms[1]), *self.gate_up).chunk(2, dim=-1)
        return _product(silu(gate).mul_(up), *self.down).add_(x)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square, rounded to x's dtype, times the weight."""
    if x.dtype == weight.dtype == torch.float32:
        return torch.rms_norm(x, weight.shape, weight, eps)
    return torch.rms_norm(x, weight.shape, None, eps) * weight


def _product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Return x [B, in] weight^T + bias, [B, out]."""
    if isinstance(weight, QuantizedTensor):
        return multiply(x, None, weight, bias, x.dtype)
    return product(x, weight, bias)


def contiguous_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy a head's input where it is a strided slice, for which torch would copy the weight once per row; a hook."""
    return (inputs[0].contiguous(),)


def _norm_of(norm: Any) -> tuple[Tensor, float]:
    return norm.weight.detach(), norm.variance_epsilon


def merge_(*linears: nn.Linear | QuantizedLinear) -> tuple[Weight, Tensor | None]:
    """Return the weights [out, in] of linear layers under one another, and their biases [out]; theirs become views.

    Args:
        linears: of one class, with biases or without; changed in place unless they are merged already.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 3)
        >>> weight, bias = merge_(a, b)
        >>> _ = a.weight.data.fill_(7)
        >>> weight[0], tuple(weight.shape), tuple(bias.shape)
        (tensor([7., 7.]), (4, 2), (4,))
    """
    weight: Weight = _adjacent_([linear.weight for linear in linears])
    scales = [linear.scale for linear in linears if isinstance(linear, QuantizedLinear)]
    if scales:
        weight = QuantizedTensor(weight, _adjacent_(scales))
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return weight, _adjacent_(biases) if biases else None


def _adjacent_(parameters: Sequence[Tensor]) -> Tensor:
    """Return parameters [N, ...] under one another in one tensor, of which they become views; a view if they are."""
    first, end = parameters[0], parameters[0].storage_offset()
    adjacent = True
    for p in parameters:
        adjacent &= p.is_contiguous() and p.storage_offset() == end
        adjacent &= p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        end += p.numel()
    with torch.inference_mode(first.is_inference()), torch.no_grad():  # new weights can be loaded into them as before
        if not adjacent:
            merged = torch.cat([p.detach() for p in parameters])
            for p, part in zip(parameters, merged.split([len(p) for p in parameters]), strict=True):
                p.data = part
        return first.detach().as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


def _is_known(model: PreTrainedModel) -> bool:
    """Whether a model is made of the parts that `_Layer` computes, and of nothing else that would be left out."""
    home = type(model).__module__
    body: Any = getattr(model, "model", None)
    family = home.rpartition(".modeling_")[2]
    if family not in FAMILIES or home != f"transformers.models.{family}.modeling_{family}":
        return False
    if type(model).__name__ not in {f"{f.capitalize()}ForCausalLM" for f in FAMILIES}:
        return False
    if set(_children(model)) != {"model", "lm_head"} or model.config.hidden_act != "silu":
        return False
    if set(_children(body)) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    if type(model.lm_head) is not nn.Linear or model.lm_head._forward_hooks:
        return False
    if any(hook is not contiguous_input for hook in model.lm_head._forward_pre_hooks.values()):
        return False
    modules = [model, body, *body.layers.modules()]
    if len(body.layers) != model.config.num_hidden_layers or any(map(_is_changed, modules)):
        return False
    return all(_is_known_layer(layer, home, 2 * len(body.rotary_emb.inv_freq)) for layer in body.layers)


def _is_known_layer(layer: Any, home: str, rotated: int) -> bool:
    if set(_children(layer)) != LAYER:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    parts, mlp_parts = _children(attention), _children(mlp)
    if set(parts) not in (ATTENTION, ATTENTION | QK_NORM) or set(mlp_parts) != MLP or attention.head_dim != rotated:
        return False
    linears = [parts[name] for name in ATTENTION] + [part for name, part in mlp_parts.items() if name != "act_fn"]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *(parts[n] for n in parts if n in QK_NORM)]
    merged = [[parts[n].bias is None for n in ("q_proj", "k_proj", "v_proj")]]
    merged.append([mlp_parts[n].bias is None for n in ("gate_proj", "up_proj")])
    return (
        (all(type(linear) is nn.Linear for linear in linears) or all(map(_is_in_int8, linears)))
        and all(type(part).__module__ == home for part in (layer, attention, mlp, *norms))
        and all(type(norm).__name__.endswith("RMSNorm") for norm in norms)
        and all(len(set(of_group)) == 1 for of_group in merged)
    )


def _is_in_int8(layer: nn.Module) -> bool:
    return type(layer) is QuantizedLinear and layer.weights == "int8" and layer.activations is None


def _is_changed(module: nn.Module) -> bool:
    """Whether something listens to a module or has replaced its computation."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _children(module: nn.Module | None) -> dict[str, nn.Module]:
    return {} if module is None else dict(module.named_children())
