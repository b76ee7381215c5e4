"""Completions laid end to end, their shared prompts once: which place attends to which, and the attention that does it.

Everything in a transformer but attention treats places one by one, so a packed row [1, N] needs no padding anywhere
else. Attention unpacks: segments of like length become the padded rows of one bucket, a segment that continues a prompt
gets the prompt's keys and values in front of its own, and the outputs go back to their places. Nothing leaks between
completions, and the gradient of a shared prompt is the sum over the completions that saw it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from drpo.positions import Limit, narrowed
from drpo.types import Layout, MicroBatch

log = logging.getLogger("drpo")

PACKED = "drpo_packed"
"""The name of this attention in transformers."""

HARMLESS = frozenset({"position_ids", "position_embeddings", "use_cache", "cache_position", "is_causal"})
"""What models hand to every attention function, and which changes nothing in this one."""

ORDINARY = {"full_attention", "sliding_attention"}
"""Kinds of layers that look at keys and values as this attention does."""

FEW_SCORES = 2**22
"""Scores that a CPU's attention makes at once where it is written out: about what its cache holds."""

SPREAD = 1.5
"""Longest over shortest of the segments in one bucket: bounds what padding costs in the attention."""


@dataclass(frozen=True, eq=False)
class _Bucket:
    """R segments of like length, as rows of one attention call.

    Args:
        segments: their numbers, longest first.
        width: Lq, the longest.
        start: of their first slot among all slots.
        source: the bucket that their prefixes stand in, or None where they have none.
        parent: [R] int64; each one's prefix as a row of `source`, or None.
        prefix: lengths [R] int64 of the prefixes, 0 where there are none.
    """

    segments: tuple[int, ...]
    width: int
    start: int
    source: int | None
    parent: Tensor | None
    prefix: Tensor

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + len(self.segments) * self.width)


@dataclass(frozen=True, eq=False)
class Packing:
    """How the N places of a layout become the M slots of padded rows, and back; for one forward pass.

    Args:
        buckets: in the order of their slots; a bucket's `source` comes before it.
        place: [M] int64; the place that stands in each slot, 0 where it is padding.
        padding: [K] int64; the slots that are padding.
        slot: [N] int64; the slot in which each place stands.
    """

    buckets: tuple[_Bucket, ...]
    place: Tensor
    padding: Tensor
    slot: Tensor
    _bias: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(layout: Layout, device: torch.device) -> "Packing":
        """Return the packing of a layout."""
        buckets = tuple(_buckets(layout, device))
        first = [0, *accumulate(layout.length)]
        place = torch.zeros(buckets[-1].slots.stop, dtype=torch.int64)
        slot = torch.empty(first[-1], dtype=torch.int64)
        for bucket in buckets:
            for row, s in enumerate(bucket.segments):
                at, n = bucket.start + row * bucket.width, layout.length[s]
                place[at : at + n] = torch.arange(first[s], first[s] + n)
                slot[first[s] : first[s] + n] = torch.arange(at, at + n)
        used = torch.zeros(len(place), dtype=torch.bool)
        used[slot] = True
        return Packing(buckets, place.to(device), (~used).nonzero()[:, 0].to(device), slot.to(device))

    def bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What bucket `number` adds to its scores, [R, 1, Lq, Lk] of 0 and -inf; None where plain causality will do."""
        bucket = self.buckets[number]
        if bucket.source is None and (window is None or window >= bucket.width):
            return None
        if (number, window, dtype) not in self._bias:
            seen = _seen(bucket, self.buckets, window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._bias[number, window, dtype] = bias
        return self._bias[number, window, dtype]


def _buckets(layout: Layout, device: torch.device) -> Iterator[_Bucket]:
    """Roots first; then what continues them, each bucket's prefixes in one bucket of roots."""
    home: dict[int, tuple[int, int]] = {}  # segment -> its bucket and row
    start = 0
    roots = [s for s, p in enumerate(layout.prefix) if p < 0]
    parts: list[tuple[int | None, list[int]]] = [(None, part) for part in _alike(roots, layout)]
    for number, (_, part) in enumerate(parts):
        home |= {s: (number, row) for row, s in enumerate(part)}
    for number in range(len(parts)):
        children = [s for s, p in enumerate(layout.prefix) if p >= 0 and home[p][0] == number]
        parts += [(number, part) for part in _alike(children, layout)]
    for source, part in parts:
        width = layout.length[part[0]]
        parent = None if source is None else torch.tensor([home[layout.prefix[s]][1] for s in part], device=device)
        prefix = torch.tensor([layout.prefix_length(s) for s in part], device=device)
        yield _Bucket(tuple(part), width, start, source, parent, prefix)
        start += width * len(part)


def _alike(segments: list[int], layout: Layout) -> list[list[int]]:
    """Longest first, cut where a segment would be padded to more than `SPREAD` times its length."""
    parts: list[list[int]] = []
    for s in sorted(segments, key=lambda s: -layout.length[s]):
        if parts and layout.length[parts[-1][0]] <= SPREAD * layout.length[s]:
            parts[-1].append(s)
        else:
            parts.append([s])
    return parts


def _seen(bucket: _Bucket, buckets: tuple[_Bucket, ...], window: int | None) -> Tensor:
    """[R, 1, Lq, Lk] bool: which keys, the prefix's and then its own, each query attends to."""
    place = torch.arange(bucket.width, device=bucket.prefix.device)
    behind = place[:, None] - place  # how far the key stands behind the query
    own = ((behind >= 0) & (behind < (window or bucket.width)))[None].expand(len(bucket.segments), -1, -1)
    if bucket.source is None:
        return own[:, None]
    key = torch.arange(buckets[bucket.source].width, device=place.device)
    prefix = bucket.prefix[:, None, None]
    there = (key < prefix).expand(-1, bucket.width, -1)
    if window is not None:
        there = there & (prefix + place[:, None] - key < window)
    return torch.cat([there, own], dim=2)[:, None]


class _Unpack(torch.autograd.Function):
    """Places [N, ...] -> slots [M, ...], padding 0. Every place has one slot, so the gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return _to_slots(x, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packing.slot), None


class _Pack(torch.autograd.Function):
    """Slots [M, ...] -> places [N, ...]: the transpose of `_Unpack`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_slots(grad, ctx.packing), None


def _unpack(x: Tensor, packing: Packing) -> Tensor:
    slots: Tensor = _Unpack.apply(x, packing)  # type: ignore[no-untyped-call]
    return slots


def _pack(x: Tensor, packing: Packing) -> Tensor:
    places: Tensor = _Pack.apply(x, packing)  # type: ignore[no-untyped-call]
    return places


def _to_slots(x: Tensor, packing: Packing) -> Tensor:
    return x.index_select(0, packing.place).index_fill_(0, packing.padding, 0)


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
    """Attend within segments and to their prefixes where a call brings a `packing`, else as transformers' SDPA does.

    Args, Returns: as of transformers' attention functions; see `_packed_attention` for the former.
    """
    if packing is None:
        own = ALL_ATTENTION_FUNCTIONS["sdpa"]
        result: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **options)
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
        packing: of the N places.
        scaling: of the scores; None is 1 / sqrt(D).
        sliding_window: places that a query sees, itself included, or None.
        others: whatever else a model passes; what changes the scores is refused.

    Returns:
        [1, N, heads, D].

    Raises:
        NotImplementedError: the model asks for what this attention does not do (soft caps, sinks, position biases).
    """
    asked = [name for name, v in others.items() if name not in HARMLESS and v is not None and v is not False]
    if asked or dropout:
        raise NotImplementedError(f"packed attention: {', '.join(asked) or 'dropout'}")
    dtype, kind = query.dtype, query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    sizes = [b.slots.stop - b.slots.start for b in packing.buckets]
    q, k, v = (_unpack(x[0].transpose(0, 1).to(dtype), packing).split(sizes) for x in (query, key, value))
    outputs = []
    for number, bucket in enumerate(packing.buckets):
        keys, values = (_with_prefix(x, number, packing.buckets) for x in (k, v))
        bias = packing.bias(number, sliding_window, dtype)
        outputs.append(_attend(_rows(q[number], bucket), keys, values, bias, scaling).flatten(0, 1))
    return _pack(torch.cat(outputs), packing)[None]


def _with_prefix(x: Sequence[Tensor], number: int, buckets: Sequence[_Bucket]) -> Tensor:
    """[R, Lk, heads, D] keys or values of one bucket, from those of all: its prefixes' and then its own."""
    own = _rows(x[number], buckets[number])
    source, parent = buckets[number].source, buckets[number].parent
    if source is None or parent is None:
        return own
    before = _rows(x[source], buckets[source]).index_select(0, parent)
    return torch.cat([before, own], dim=1)


def _rows(slots: Tensor, bucket: _Bucket) -> Tensor:
    """[R * width, heads, D] -> [R, width, heads, D]."""
    return slots.view(-1, bucket.width, *slots.shape[1:])


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention of R rows.

    On a CPU the products and the softmax are written out, for as many rows at once as make `FEW_SCORES`: forward and
    backward took a third of the time of PyTorch's own kernel in bfloat16 (64 rows of 31 queries and 70 keys, and 16 of
    255 and 303), and as long in float32. Rows too long for that, and other devices, get PyTorch's.

    Args:
        query: [R, Lq, heads, D].
        key, value: [R, Lk, key heads, D].
        bias: [R, 1, Lq, Lk], or None for plain causality.
        scale: of the scores; None is 1 / sqrt(D).

    Returns:
        [R, Lq, heads, D].
    """
    n_rows, n_queries, heads, _ = query.shape
    at_once = min(n_rows, FEW_SCORES // (heads * n_queries * key.shape[1]))
    if query.device.type == "cpu" and at_once > 0:
        columns = (query, key, value) if bias is None else (query, key, value, bias)
        parts = zip(*(x.split(at_once) for x in columns), strict=True)
        return torch.cat([_attend_written_out(*part, scale=scale) for part in parts])
    if bias is not None:  # only without one does PyTorch share keys between heads in every kernel
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
    """The same, with the heads that share a key side by side as its queries."""
    n_rows, n_queries, heads, width = query.shape
    n_keys, key_heads = key.shape[1:3]
    scaled = query * (width**-0.5 if scale is None else scale)
    q = scaled.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).reshape(n_rows * key_heads, -1, width)
    k = key.permute(0, 2, 3, 1).reshape(n_rows * key_heads, width, n_keys)
    v = value.transpose(1, 2).reshape(n_rows * key_heads, n_keys, -1)
    scores = torch.bmm(q, k).view(n_rows, heads, n_queries, n_keys)
    if bias is None:
        bias = scores.new_full((n_queries, n_keys), -torch.inf).triu_(1)
    p = torch.softmax(scores + bias, dim=-1).view(n_rows * key_heads, -1, n_keys)
    out = torch.bmm(p, v).view(n_rows, key_heads, heads // key_heads, n_queries, -1)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


AttentionInterface.register(PACKED, attention)
AttentionMaskInterface.register(PACKED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def packed(model: PreTrainedModel, input_ids: Tensor, layout: Layout) -> Tensor:
    """Return the last hidden states [N, H] of N places in one row, by `attention`.

    Args:
        model: one that `adopt` returned True for.
        input_ids: [N] int64.
        layout: of the N places.
    """
    out = model.get_decoder()(
        input_ids=input_ids[None],
        # A mask of four dimensions is taken as it is, which keeps transformers from making one of [N, N].
        attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),
        position_ids=layout.positions().to(input_ids.device)[None],
        use_cache=False,
        packing=Packing.of(layout, input_ids.device),
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def padded(model: PreTrainedModel, input_ids: Tensor, layout: Layout) -> Tensor:
    """Return the same as `packed`, for any model: a row for each sequence, prompts repeated, padded on the right.

    Padding stands where causal attention cannot see it, so its id does not matter.
    """
    first = [0, *accumulate(layout.length)]
    places = [torch.arange(first[s], first[s + 1]) for s in range(len(layout.length))]
    tails = [s for s in range(len(places)) if s not in layout.prefix]
    rows = [torch.cat([places[p], places[s]]) if (p := layout.prefix[s]) >= 0 else places[s] for s in tails]
    width = max(map(len, rows))
    slot = torch.empty(len(input_ids), dtype=torch.int64)
    for b, row in enumerate(rows):
        slot[row] = b * width + torch.arange(len(row))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(input_ids.device)
    out = model.get_decoder()(input_ids=input_ids[ids], use_cache=False)
    hidden: Tensor = out.last_hidden_state.flatten(0, 1)[slot.to(input_ids.device)]
    return hidden


def predicting(model: PreTrainedModel, micro: MicroBatch, dtype: torch.dtype, *, shared: bool, limit: Limit) -> Tensor:
    """Return the last hidden states [T, H] that predict a micro-batch's tokens.

    Args:
        model: whose decoder runs.
        micro: on the model's device.
        dtype: of the products, and of the states.
        shared: `packed`, as `adopt` returned True for the model; else `padded`.
        limit: of the model, as `sequence_limit` returned it.

    Raises:
        InputError: a sequence is longer than the limit.
    """
    layout = micro.layout
    limit.require(max(layout.prefix_length(s) + n for s, n in enumerate(layout.length)))
    with torch.autocast(micro.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = (packed if shared else padded)(model, micro.input_ids, layout)
    return hidden[micro.position].to(dtype)


@torch.no_grad()
def adopt(model: PreTrainedModel) -> bool:
    """Give a model packed attention and return True; where that does not give what its own gives, leave it and False.

    Two prompts of different lengths with several answers each go both ways, past a sliding window, which is shortened
    for them. Models whose attention is not transformers' own, or that mix places in other ways (recurrence,
    convolution), fail this and are run padded.

    Args:
        model: in its own attention.
    """
    layout = Layout(length=(5, 4, 2, 1, 3, 3, 1, 6), prefix=(-1, 0, 0, 0, -1, 4, 4, -1))
    ids = 1 + 7 * torch.arange(layout.n_places) % (model.config.get_text_config().vocab_size - 1)
    ids = ids.to(model.device)
    own = model.config._attn_implementation
    with narrowed(model):
        wanted = padded(model, ids, layout)
        if _agrees(model, ids, layout, wanted):
            return True
    model.set_attn_implementation(own)
    return False


def _agrees(model: PreTrainedModel, ids: Tensor, layout: Layout, wanted: Tensor) -> bool:
    """Set packed attention, and compare what it gives with the states that are wanted."""
    try:
        if not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= ORDINARY:
            return False
        model.set_attn_implementation(PACKED)
        found = packed(model, ids, layout)
        return torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    except Exception as error:  # whatever a model does that this attention was not made for
        log.debug("%s cannot be packed: %s", type(model).__name__, error)
    return False
