"""Attention of one new token per row, to its prompt's keys, which the row's group shares, and to its own."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from drpo.rollout.cache import GroupCache

NAME = "drpo_grouped"

# What models hand to every attention function, and which changes nothing in this one.
HARMLESS = frozenset({"dropout", "position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal"})


class UnsupportedError(Exception):
    """The model's attention asks for something that `grouped_attention` does not do."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    groups: GroupCache | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend from one new token of every row, as transformers' attention functions do.

    A prompt's keys meet the queries of all its rows, and of all heads that share a key-value head, in one product, and
    are read once; so are a row's own. One softmax runs over both.

    Args:
        module: the attention layer.
        query: [B, H, 1, D].
        key, value: [B, K, C, .]; what `GroupCache.update` returned.
        attention_mask: None; `groups` knows what is seen.
        scaling: of the scores; D ** -0.5 where None.
        sliding_window: how far back the layer looks, or None.
        groups: the cache.
        others: what else the model asks for.

    Returns:
        [B, 1, H, E], and no weights.

    Raises:
        UnsupportedError: the model asks for more, such as a soft cap or a bias.
    """
    if groups is None:
        raise UnsupportedError("the cache is not handed on to the attention")
    layer = groups.layers[module.layer_idx]
    asked = sorted(name for name, v in others.items() if name not in HARMLESS and v is not None and v is not False)
    if asked or attention_mask is not None or key is not layer.keys or sliding_window != layer.window:
        raise UnsupportedError(
            f"it asks for {', '.join(asked) or 'another mask, window, or keys than those of the cache'}"
        )

    n_rows, heads, _, width = query.shape
    kv_heads, prompt_length = layer.prompt_keys.shape[1:3]
    q = (query * (width**-0.5 if scaling is None else scaling)).reshape(n_rows, kv_heads, heads // kv_heads, width)
    to_prompt = groups.by_row(groups.by_prompt(q) @ layer.prompt_keys.mT)
    scores = torch.cat([to_prompt, q @ key.mT], dim=-1).add_(groups.bias(layer))
    weights = torch.softmax(scores, dim=-1)
    out = weights[..., prompt_length:] @ value
    out += groups.by_row(groups.by_prompt(weights[..., :prompt_length]) @ layer.prompt_values)
    return out.reshape(n_rows, 1, heads, -1), None


AttentionInterface.register(NAME, grouped_attention)
