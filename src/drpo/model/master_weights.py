"""Matrices that the trainer holds in bfloat16; its products round them to bfloat16 anyway."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drpo.model.quantize import stacked_experts


def matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights of linear layers, embeddings and stacked experts, each once.

    Left out are adapters, and what the model's family keeps in float32.

    Args:
        model: any model.
    """
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(torch.bfloat16)]
    layers = [(n, m, "weight") for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    found: dict[nn.Parameter, None] = {}
    for name, module, field in [*layers, *stacked_experts(model)]:
        weight, full = getattr(module, field), f"{name}.{field}"
        left_out = ".lora_" in full or any(pattern.search(full) for pattern in kept)
        if isinstance(weight, nn.Parameter) and not left_out:
            found[weight] = None
    return list(found)


def hold_in_bfloat16(model: PreTrainedModel) -> None:
    """Round the matrices to bfloat16, in place; published weights are such numbers already.

    Args:
        model: on any device; before it goes to a GPU, for which it is half as large then.
    """
    for weight in matrices(model):
        weight.data = weight.data.to(torch.bfloat16)


def widen_embeddings(model: PreTrainedModel) -> None:
    """Make embeddings return float32, as they do from float32 weights.

    With autocast in bfloat16 the model then computes what it computes from float32 weights of these values, bit for
    bit, where its embeddings only look up and it has no stacked experts.

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_wide_output)


def _wide_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


@contextmanager
def in_float32(module: nn.Module, recurse: bool = True) -> Iterator[None]:
    """Hold a module's bfloat16 weights in float32 for a while; changes to them are lost.

    Args:
        module: changed in place.
        recurse: those of the modules within, too.
    """
    held = {p: p.data for p in module.parameters(recurse) if p.dtype == torch.bfloat16}
    for p, data in held.items():
        p.data = data.float()
    try:
        yield
    finally:
        for p, data in held.items():
            p.data = data


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Compute from bfloat16 weights in float32, without gradients; one module at a time is held in it."""
    modules = [m for m in model.modules() if any(p.dtype == torch.bfloat16 for p in m.parameters(recurse=False))]
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = partial(_in_float32, module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward")
            if forward is not None:
                vars(module)["forward"] = forward


def _in_float32(module: nn.Module, forward: Any, *inputs: Any, **named: Any) -> Any:
    with in_float32(module, recurse=False):
        return forward(*inputs, **named)
