"""Attention over a packed row, and a micro-batch's hidden states; padded rows for models that cannot be packed."""

import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drpo.errors import InputError
from drpo.model.decoder import decoder_of
from drpo.model.packing import Bucket, Packing, pack, rows, unpack
from drpo.model.positions import Limit, narrowed
from drpo.types import Layout, MicroBatch
from drpo.types.routes import none_chosen

log = logging.getLogger("drpo")

PACKED = "drpo_packed"
"""This attention's name in transformers."""

HARMLESS = frozenset({"position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal"})
"""Arguments that models pass to every attention function and that have no effect here."""

ORDINARY = {"full_attention", "sliding_attention"}
"""The layer types that this attention implements."""

FEW_SCORES = 2**22
"""Scores computed at once by the CPU attention below, about as many as fit into the cache."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend within segments and to their prefixes if `packing` is passed, else as transformers' SDPA.

    Args, Returns: as for transformers' attention functions; see `_packed_attention` for packed rows.
    """
    if packing is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        result: tuple[Tensor, Tensor | None] = sdpa(module, query, key, value, attention_mask, **options)
        return result
    return _packed_attention(query, key, value, packing, **options), None


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: object,
) -> Tensor:
    """Attend within segments and to their prefixes.

    Args:
        query: [1, heads, N, D].
        key, value: [1, key heads, N, D].
        packing: the packing of the N positions.
        scaling: factor of the scores; None is 1 / sqrt(D).
        sliding_window: positions visible to a query, itself included, or None.
        others: further arguments of the model; those that change the scores raise.

    Returns:
        [1, N, heads, D].

    Raises:
        NotImplementedError: the model requires soft caps, sinks, position biases or dropout.
    """
    unsupported = [name for name, v in others.items() if name not in HARMLESS and v is not None and v is not False]
    if unsupported or dropout:
        raise NotImplementedError(f"packed attention: {', '.join(unsupported) or 'dropout'}")
    dtype, kind = query.dtype, query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    sizes = [b.slots.stop - b.slots.start for b in packing.buckets]
    q, k, v = (unpack(x[0].transpose(0, 1).to(dtype), packing).split(sizes) for x in (query, key, value))
    outputs = []
    for number, bucket in enumerate(packing.buckets):
        keys, values = (_with_prefix(x, number, packing.buckets) for x in (k, v))
        bias = packing.bias(number, sliding_window, dtype)
        outputs.append(_attend(rows(q[number], bucket), keys, values, bias, scaling).flatten(0, 1))
    return pack(torch.cat(outputs), packing)[None]


def _with_prefix(x: Sequence[Tensor], number: int, buckets: Sequence[Bucket]) -> Tensor:
    """Return the keys or values [R, Lk, heads, D] of one bucket, its prefixes' first."""
    segments = rows(x[number], buckets[number])
    source, parent = buckets[number].source, buckets[number].parent
    if source is None or parent is None:
        return segments
    prefixes = rows(x[source], buckets[source]).index_select(0, parent)
    return torch.cat([prefixes, segments], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Return the attention of R rows.

    On a CPU, explicit products and a softmax process as many rows at once as have `FEW_SCORES` scores. Forward and
    backward take a third of the time of PyTorch's kernel in bfloat16 (64 rows of 31 queries and 70 keys; 16 rows of 255
    and 303), and equal time in float32. Longer rows and other devices use PyTorch's kernel.

    Args:
        query: [R, Lq, heads, D].
        key, value: [R, Lk, key heads, D].
        bias: [R, 1, Lq, Lk], or None for plain causality.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        [R, Lq, heads, D].
    """
    nrows, n_queries, heads, _ = query.shape
    at_once = min(nrows, FEW_SCORES // (heads * n_queries * key.shape[1]))
    if query.device.type == "cpu" and at_once > 0:
        columns = (query, key, value) if bias is None else (query, key, value, bias)
        parts = zip(*(x.split(at_once) for x in columns), strict=True)
        return torch.cat([_attend_written_out(*part, scale=scale) for part in parts])
    if bias is not None:  # with a bias, not every PyTorch kernel shares keys between heads
        key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    out: Tensor = nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
        enable_gqa=heads != key.shape[2],
    )
    return out.transpose(1, 2)


def _attend_written_out(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, scale: float | None
) -> Tensor:
    """Return the attention by explicit products; heads that share a key are batched as its queries."""
    nrows, n_queries, heads, width = query.shape
    n_keys, key_heads = key.shape[1:3]
    scaled = query * (width**-0.5 if scale is None else scale)
    q = scaled.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).reshape(nrows * key_heads, -1, width)
    k = key.permute(0, 2, 3, 1).reshape(nrows * key_heads, width, n_keys)
    v = value.transpose(1, 2).reshape(nrows * key_heads, n_keys, -1)
    scores = torch.bmm(q, k).view(nrows, heads, n_queries, n_keys)
    if bias is None:
        bias = scores.new_full((n_queries, n_keys), -torch.inf).triu_(1)
    p = torch.softmax(scores + bias, dim=-1).view(nrows * key_heads, -1, n_keys)
    out = torch.bmm(p, v).view(nrows, key_heads, heads // key_heads, n_queries, -1)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


AttentionInterface.register(PACKED, attention)
AttentionMaskInterface.register(PACKED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def packed(model: PreTrainedModel, input_ids: Tensor, layout: Layout, routes: Tensor | None = None) -> Tensor:
    """Return the last hidden states [N, H] of N positions in one row, by `attention`.

    Args:
        model: a model for which `enable_packed_attention` returned True.
        input_ids: [N] int64.
        layout: the layout of the N positions.
        routes: [N, L, k]; experts to replay, of a model with `RoutingReplay`, or None.
    """
    out = decoder_of(model)(
        input_ids=input_ids[None],
        # transformers uses a four-dimensional mask as it is, and so builds no mask [N, N].
        attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),
        position_ids=layout.positions().to(input_ids.device)[None],
        use_cache=False,
        packing=Packing.of(layout, input_ids.device),
        **told(routes),
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def told(routes: Tensor | None) -> dict[str, Tensor]:
    """Return the further argument of a decoder with `RoutingReplay`; none where there is nothing to replay."""
    return {} if routes is None else {"routes": routes}


def padded(model: PreTrainedModel, input_ids: Tensor, layout: Layout, routes: Tensor | None = None) -> Tensor:
    """Return the same as `packed`, for any model: one right-padded row per sequence, prompts repeated.

    Causal attention never sees right padding, so its id does not matter.
    """
    at, slot = (x.to(input_ids.device) for x in padded_rows(layout))
    ids = input_ids[at.clamp(min=0)]
    if routes is not None:
        routes = torch.where((at < 0)[..., None, None], none_chosen(1, routes), routes[at]).flatten(0, 1)
    out = decoder_of(model)(input_ids=ids, use_cache=False, **told(routes))
    hidden: Tensor = out.last_hidden_state.flatten(0, 1)[slot]
    return hidden


def padded_rows(layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the position that each slot [B, W] of padded rows holds, -1 for padding, and each position's slot [N]."""
    first = [0, *accumulate(layout.length)]
    positions = [torch.arange(first[s], first[s + 1]) for s in range(len(layout.length))]
    tails = [s for s in range(len(positions)) if s not in layout.prefix]
    rows = [torch.cat([positions[p], positions[s]]) if (p := layout.prefix[s]) >= 0 else positions[s] for s in tails]
    width = max(map(len, rows))
    slot = torch.empty(first[-1], dtype=torch.int64)
    for b, row in enumerate(rows):
        slot[row] = b * width + torch.arange(len(row))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1), slot


def predictor_states(
    model: PreTrainedModel,
    micro: MicroBatch,
    dtype: torch.dtype,
    *,
    shared: bool,
    limit: Limit,
    routes: Tensor | None = None,
) -> Tensor:
    """Return the last hidden states [T, H] that predict a micro-batch's tokens.

    Args:
        model: its decoder runs.
        micro: on the model's device.
        dtype: the dtype of the products and of the states.
        shared: True for `packed` (`enable_packed_attention` returned True for the model), False for `padded`.
        limit: the model's limit, from `sequence_limit`.
        routes: [N, L, k]; experts to replay at the micro-batch's positions, of a model with `RoutingReplay`, or None.

    Raises:
        InputError: a sequence is longer than the limit.
    """
    layout = micro.layout
    limit.require(max(layout.prefix_length(s) + n for s, n in enumerate(layout.length)))
    with torch.autocast(micro.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = (packed if shared else padded)(model, micro.input_ids, layout, routes)
    return hidden[micro.position].to(dtype)


@torch.no_grad()
def enable_packed_attention(model: PreTrainedModel) -> bool:
    """Set packed attention and return True; if it changes the model's states, restore the attention and return False.

    The check compares both on two prompts of different lengths with several answers each, beyond a shortened sliding
    window. Models with another attention than transformers', or that mix positions in other ways (recurrence,
    convolution), fail the check and run padded.

    Args:
        model: a model with its original attention.
    """
    layout = Layout(length=(5, 4, 2, 1, 3, 3, 1, 6), prefix=(-1, 0, 0, 0, -1, 4, 4, -1))
    ids = 1 + 7 * torch.arange(layout.n_positions) % (model.config.get_text_config().vocab_size - 1)
    ids = ids.to(model.device)
    original = model.config._attn_implementation
    with narrowed(model):
        expected = padded(model, ids, layout)
        if _agrees(model, ids, layout, expected):
            return True
    model.set_attn_implementation(original)
    return False


@torch.no_grad()
def require_unseen_padding(model: PreTrainedModel) -> None:
    """Raise if a text's states change with the padding behind it, as in a row of `padded`.

    Raises:
        InputError: they do.
    """
    lengths = (3, 11)
    ids = 1 + 7 * torch.arange(sum(lengths), device=model.device) % (model.config.get_text_config().vocab_size - 1)
    together = padded(model, ids, Layout(lengths, (-1, -1)))
    alone = torch.cat([padded(model, text, Layout((len(text),), (-1,))) for text in ids.split(lengths)])
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()), equal_nan=True):
        raise InputError(
            f"model {type(model).__name__}: a text's states change with the padding behind it, so log-probabilities "
            "would depend on what else is in the batch, which drpo does not train, with any --engine"
        )


def _agrees(model: PreTrainedModel, ids: Tensor, layout: Layout, expected: Tensor) -> bool:
    """Set packed attention, and return whether its states equal the expected ones."""
    try:
        if not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= ORDINARY:
            return False
        model.set_attn_implementation(PACKED)
        states = packed(model, ids, layout)
        return torch.allclose(states, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    except Exception as error:  # a model that packed attention does not support
        log.debug("%s cannot be packed: %s", type(model).__name__, error)
    return False
