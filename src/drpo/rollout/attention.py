"""Attention of new tokens of a row to its prompt's keys, shared by the group, and to the row's own keys."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from drpo.rollout.cache import GroupCache, GroupLayer

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
    scale = width**-0.5 if scaling is None else scaling
    out = attend(query.reshape(n_rows, layer.keys.shape[1], -1, width), scale, groups, layer, n_queries)
    out = out.unflatten(2, (-1, n_queries)).permute(0, 3, 1, 2, 4).contiguous()
    return out.reshape(n_rows, n_queries, heads, -1), None


def attend(query: Tensor, scale: float, groups: GroupCache, layer: GroupLayer, n_queries: int = 1) -> Tensor:
    """Return the attention of the newest Q tokens of every row, [B, K, R Q, E].

    Args:
        query: [B, K, R Q, D]; R query heads share a key-value head.
        scale: factor of the scores.
        groups: the cache, to which the tokens were appended.
        layer: of the cache.
        n_queries: Q.
    """
    query, bias = query * scale, groups.bias(layer, n_queries)
    if layer.whole is not None:  # each prompt has one row
        keys, values = layer.whole
        return _weights(query @ keys.mT, bias, n_queries) @ values
    prompt_length = layer.prompt_keys.shape[2]
    to_prompt = groups.by_row(groups.by_prompt(query) @ layer.prompt_keys.mT)
    weights = _weights(torch.cat([to_prompt, query @ layer.keys.mT], dim=-1), bias, n_queries)
    out = weights[..., prompt_length:] @ layer.values
    out += groups.by_row(groups.by_prompt(weights[..., :prompt_length]) @ layer.prompt_values)
    return out


def _weights(scores: Tensor, bias: Tensor, n_queries: int) -> Tensor:
    """Return the probabilities of scores [B, K, R Q, C], to which the bias [B, 1, Q, C] is added in place."""
    if n_queries == 1:
        scores += bias
    else:
        scores.unflatten(2, (-1, n_queries)).add_(bias[:, :, None])
    return torch.softmax(scores, dim=-1)


AttentionInterface.register(NAME, grouped_attention)
