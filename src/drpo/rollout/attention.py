"""Attention of new tokens of a row to its prompt's keys, shared by the group, and to the row's own keys."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from drpo.rollout.cache import GroupCache

NAME = "drpo_grouped"

# Arguments that models pass to every attention function and that have no effect here.
HARMLESS = frozenset({"dropout", "position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal"})


class UnsupportedError(Exception):
    """The model's attention requires a feature that `grouped_attention` lacks."""


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
    """Attend from the newest Q tokens of every row; a transformers attention function.

    One product multiplies a prompt's keys by the queries of all its rows and of all heads that share a key-value head,
    so the keys are read once; so are a row's own keys. One softmax runs over both.

    Args:
        module: the attention layer.
        query: [B, H, Q, D].
        key, value: [B, K, C, .]; what `GroupCache.update` returned.
        attention_mask: None; `groups` holds the mask.
        scaling: factor of the scores; None is D ** -0.5.
        sliding_window: positions visible to a query, itself included, or None.
        groups: the cache.
        others: further arguments of the model.

    Returns:
        [B, Q, H, E], and no weights.

    Raises:
        UnsupportedError: the model requires more, such as a soft cap or a bias.
    """
    if groups is None:
        raise UnsupportedError("the model does not pass the cache to its attention")
    layer = groups.layers[module.layer_idx]
    extra = sorted(name for name, v in others.items() if name not in HARMLESS and v is not None and v is not False)
    if extra or attention_mask is not None or key is not layer.keys or sliding_window != layer.window:
        raise UnsupportedError(
            f"it requires {', '.join(extra) or 'another mask, window, or keys than those of the cache'}"
        )

    n_rows, heads, n_queries, width = query.shape
    kv_heads, prompt_length = layer.prompt_keys.shape[1:3]
    per_key, scale = heads // kv_heads, width**-0.5 if scaling is None else scaling
    q = (query * scale).reshape(n_rows, kv_heads, per_key * n_queries, width)
    to_prompt = groups.by_row(groups.by_prompt(q) @ layer.prompt_keys.mT)
    scores = torch.cat([to_prompt, q @ key.mT], dim=-1)
    scores.unflatten(2, (per_key, n_queries)).add_(groups.bias(layer, n_queries)[:, :, None])
    weights = torch.softmax(scores, dim=-1)
    out = weights[..., prompt_length:] @ value
    out += groups.by_row(groups.by_prompt(weights[..., :prompt_length]) @ layer.prompt_values)
    out = out.unflatten(2, (per_key, n_queries)).permute(0, 3, 1, 2, 4).contiguous()
    return out.reshape(n_rows, n_queries, heads, -1), None


AttentionInterface.register(NAME, grouped_attention)
