"""Completions end to end in one packed row, each shared prompt once.

All parts of a transformer but attention treat positions one by one, so a packed row [1, N] needs no padding there. For
attention, segments of similar length become the padded rows of one bucket. A segment that continues a prompt gets the
prompt's keys and values before its own. The outputs return to their positions. No completion attends to another, and
the gradient of a shared prompt is the sum over its completions.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drpo.types import Layout

SPREAD = 1.5
"""Largest ratio of segment lengths in one bucket; bounds the cost of padding in the attention."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """R segments of similar length, as rows of one attention call.

    Args:
        segments: their numbers, longest first.
        width: Lq, the longest length.
        start: the bucket's first slot.
        source: the bucket of their prefixes, or None without prefixes.
        parent: [R] int64; the row of each segment's prefix in `source`, or None.
        prefix: [R] int64; the prefixes' lengths, 0 without one.
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
    """The map between the N positions of a layout and the M slots of padded rows, for one forward pass.

    Args:
        buckets: in the order of their slots; a bucket's `source` comes before it.
        position: [M] int64; the position of each slot, 0 for padding.
        padding: [K] int64; the slots that are padding.
        slot: [N] int64; the slot of each position.
    """

    buckets: tuple[Bucket, ...]
    position: Tensor
    padding: Tensor
    slot: Tensor
    _bias: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(layout: Layout, device: torch.device) -> "Packing":
        """Return the packing of a layout."""
        buckets = tuple(_buckets(layout, device))
        first = [0, *accumulate(layout.length)]
        position = torch.zeros(buckets[-1].slots.stop, dtype=torch.int64)
        slot = torch.empty(first[-1], dtype=torch.int64)
        for bucket in buckets:
            for row, s in enumerate(bucket.segments):
                at, n = bucket.start + row * bucket.width, layout.length[s]
                position[at : at + n] = torch.arange(first[s], first[s] + n)
                slot[first[s] : first[s] + n] = torch.arange(at, at + n)
        used = torch.zeros(len(position), dtype=torch.bool)
        used[slot] = True
        return Packing(buckets, position.to(device), (~used).nonzero()[:, 0].to(device), slot.to(device))

    def bias(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return the mask of bucket `number`'s scores, [R, 1, Lq, Lk] of 0 and -inf; None for plain causality."""
        bucket = self.buckets[number]
        if bucket.source is None and (window is None or window >= bucket.width):
            return None
        if (number, window, dtype) not in self._bias:
            visible = _visible(bucket, self.buckets, window)
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._bias[number, window, dtype] = bias
        return self._bias[number, window, dtype]


def _buckets(layout: Layout, device: torch.device) -> Iterator[Bucket]:
    """Yield the roots' buckets, then their continuations'; the prefixes of a bucket are all in one bucket."""
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
        yield Bucket(tuple(part), width, start, source, parent, prefix)
        start += width * len(part)


def _alike(segments: list[int], layout: Layout) -> list[list[int]]:
    """Sort segments longest first, and split where padding would exceed `SPREAD` times a segment's length."""
    parts: list[list[int]] = []
    for s in sorted(segments, key=lambda s: -layout.length[s]):
        if parts and layout.length[parts[-1][0]] <= SPREAD * layout.length[s]:
            parts[-1].append(s)
        else:
            parts.append([s])
    return parts


def _visible(bucket: Bucket, buckets: tuple[Bucket, ...], window: int | None) -> Tensor:
    """Return [R, 1, Lq, Lk] bool: the keys, prefix first, that each query attends to."""
    position = torch.arange(bucket.width, device=bucket.prefix.device)
    distance = position[:, None] - position  # query - key
    in_segment = ((distance >= 0) & (distance < (window or bucket.width)))[None].expand(len(bucket.segments), -1, -1)
    if bucket.source is None:
        return in_segment[:, None]
    key = torch.arange(buckets[bucket.source].width, device=position.device)
    prefix = bucket.prefix[:, None, None]
    in_prefix = (key < prefix).expand(-1, bucket.width, -1)
    if window is not None:
        in_prefix = in_prefix & (prefix + position[:, None] - key < window)
    return torch.cat([in_prefix, in_segment], dim=2)[:, None]


class _Unpack(torch.autograd.Function):
    """Positions [N, ...] -> slots [M, ...], padding 0. Each position has one slot, so the gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return _to_slots(x, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packing.slot), None


class _Pack(torch.autograd.Function):
    """Slots [M, ...] -> positions [N, ...]: the transpose of `_Unpack`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_slots(grad, ctx.packing), None


def unpack(x: Tensor, packing: Packing) -> Tensor:
    """Return positions [N, ...] as slots [M, ...], 0 for padding."""
    slots: Tensor = _Unpack.apply(x, packing)  # type: ignore[no-untyped-call]
    return slots


def pack(x: Tensor, packing: Packing) -> Tensor:
    """Return slots [M, ...] as positions [N, ...]."""
    positions: Tensor = _Pack.apply(x, packing)  # type: ignore[no-untyped-call]
    return positions


def _to_slots(x: Tensor, packing: Packing) -> Tensor:
    return x.index_select(0, packing.position).index_fill_(0, packing.padding, 0)


def rows(slots: Tensor, bucket: Bucket) -> Tensor:
    """Return the slots of one bucket [R * width, heads, D] as rows [R, width, heads, D]."""
    return slots.view(-1, bucket.width, *slots.shape[1:])
