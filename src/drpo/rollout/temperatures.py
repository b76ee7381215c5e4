"""Llama 4's attention temperatures, which transformers takes from a token's place in the padded row."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from drpo.model.decoder import decoder_of


def temper_by_position(model: Any) -> None:
    """Let queries without rotary embeddings be scaled by their position in the text, whatever padding is before it.

        scale = 1 + attn_scale log(1 + floor((position + 1) / floor_scale))

    It changes nothing where no padding is before a text.

    Args:
        model: its layers with such a scale (Llama 4's) get hooks, and leave out their own.
    """
    positions: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions[:] = [named["position_ids"]]

    def scaled(attention: Any, projected: Tensor) -> Tensor:
        steps = torch.floor((positions[0].float() + 1) / attention.floor_scale)
        scale: Tensor = 1 + attention.attn_scale * torch.log1p(steps)
        return (projected * scale[..., None]).to(projected.dtype)

    for layer in _tempered(model):
        attention = layer.self_attn
        attention.attn_temperature_tuning = False
        layer.register_forward_pre_hook(note, with_kwargs=True)
        attention.q_proj.register_forward_hook(lambda _, __, projected, own=attention: scaled(own, projected))


def _tempered(model: Any) -> Iterator[Any]:
    """Yield the layers that scale their queries."""
    for layer in decoder_of(model).modules():
        attention: Any = getattr(layer, "self_attn", None)
        if getattr(attention, "attn_temperature_tuning", False) and not attention.use_rope:
            yield layer
