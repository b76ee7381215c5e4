"""The logits of one chunk of tokens, [C, V], and what is read from them before the softmax overwrites them.

C tokens of a chunk, H states, V tokens of the vocabulary. One buffer serves every chunk. Where the products round
(bfloat16, float16 on a CPU), the logits of a few tokens are computed once more in float32. A soft cap is applied here.

Divergences from the sampler need the logits of other tokens than the target. They are read here, relative to the
target's logit, and become log-probabilities once the target's is known.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drpo.objectives.divergence import TOPK
from drpo.ops import rows
from drpo.ops.head import Head
from drpo.types import TopK

CHUNK_BYTES = {"cpu": 30 * 2**20, "cuda": 2**30}
"""Bytes of logits held at once where `chunk` is None: enough for fast products, independent of V and T."""

BLOCK = 2048
"""Rows of the weight per product on a CPU: a block of the weight and of its gradient stays in the cache."""

ROUNDED = (torch.bfloat16, torch.float16)

GATHERED = 2**22
"""Upper bound of weight elements converted to float32 at once, for exact logits."""

DENSE = 1 / 8
"""Above this share of the vocabulary, a product with the whole weight is cheaper than gathering rows."""


class HeadOptions(NamedTuple):
    """The operators' arguments that have no gradient; scale and soft cap are the head's."""

    scale: float
    soft_cap: float | None
    temperature: float
    chunk: int | None
    auxiliary: "AuxiliaryOutputs | None"

    @staticmethod
    def of(head: Head, temperature: float, chunk: int | None, auxiliary: "AuxiliaryOutputs | None") -> "HeadOptions":
        return HeadOptions(head.scale, head.soft_cap, temperature, chunk, auxiliary)


@dataclass(frozen=True, eq=False)
class ChunkedHead:
    """A head in the dtype of the products, with the chunk size and the buffer of its logits.

    Args:
        weight: [V, H].
        bias: [V] or None.
        steepness: the softmax's factor of the logits: scale / temperature, or 1 / temperature with a soft cap, which is
            applied to the scaled logits.
        scale: the head's; applied here where there is a soft cap.
        soft_cap: the head's, or None.
        chunk: tokens per chunk.
        buffer: [chunk, V], reused for every chunk, which avoids page faults. None where the product itself returns
            float32 logits of 16-bit inputs.
    """

    weight: Tensor
    bias: Tensor | None
    steepness: float
    scale: float
    soft_cap: float | None
    chunk: int
    buffer: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> "ChunkedHead":
        low = weight.detach().to(hidden.dtype)
        widens = low.is_cuda and low.dtype in ROUNDED
        logit_bytes = 4 if widens else low.element_size()
        most = options.chunk or max(1, CHUNK_BYTES.get(hidden.device.type, 2**30) // (len(low) * logit_bytes))
        n_chunks = max(1, -(-len(hidden) // most))
        size = -(-len(hidden) // n_chunks)
        return ChunkedHead(
            weight=low,
            bias=None if bias is None else bias.detach().to(hidden.dtype),
            steepness=(options.scale if options.soft_cap is None else 1) / options.temperature,
            scale=options.scale,
            soft_cap=options.soft_cap,
            chunk=size,
            buffer=None if widens else low.new_empty(size, len(low)),
        )

    def chunks(self, n: int) -> Iterator[slice]:
        return (slice(i, i + self.chunk) for i in range(0, n, max(1, self.chunk)))

    def linear(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, rows.Exact]]:
        """Return logits [C, V] = weight hidden + bias; where they are rounded, also those of `ids` [C, n] in float32.

        The second result holds the latter under the key "exact", or is empty.
        """
        if self.buffer is None:
            out = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
            return (out if self.bias is None else out.add_(self.bias)), {}
        out = self.buffer[: len(hidden)]
        for block in blocks(self.weight):
            if self.bias is None:
                torch.mm(hidden, self.weight[block].T, out=out[:, block])
            else:
                torch.addmm(self.bias[block], hidden, self.weight[block].T, out=out[:, block])
        if out.dtype not in ROUNDED:
            return out, {}
        # Rounding a logit moves log p by as much (0.06 at a logit of 20), so the few that are read are exact.
        full = self._in_full(hidden.float(), ids)
        return out, {"exact": (ids, full if self.bias is None else full + self.bias.float()[ids])}

    def cap(self, x: Tensor, derivative: Tensor | None = None) -> None:
        """Replace x [C, n] by soft_cap tanh(scale x / soft_cap); write its derivative in x to `derivative` [C, n]."""
        assert self.soft_cap is not None
        for start in range(0, x.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            wide = x[:, block].to(torch.promote_types(x.dtype, torch.float32))
            share = torch.tanh(wide * (self.scale / self.soft_cap))
            x[:, block] = share * self.soft_cap
            if derivative is not None:
                derivative[:, block] = (1 - share.square()) * self.scale

    def _in_full(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of `ids` [C, n] in float32, from a few rows of the weight at a time."""
        if ids.shape[1] > DENSE * len(self.weight):
            everything = torch.cat([hidden @ self.weight[block].float().T for block in blocks(self.weight)], 1)
            return everything.gather(1, ids)
        size = max(1, GATHERED // max(1, hidden.numel()))
        parts = ids.split(size, 1)
        return torch.cat([(self.weight[part].float() @ hidden[:, :, None])[..., 0] for part in parts], 1)


def blocks(weight: Tensor) -> Iterator[slice]:
    """Return slices of the weight's rows: blocks on a CPU, the whole on a GPU."""
    size = BLOCK if weight.device.type == "cpu" else len(weight)
    return (slice(i, i + size) for i in range(0, len(weight), size))


@dataclass(frozen=True, eq=False)
class AuxiliaryOutputs:
    """Outputs without a gradient, computed from the log-probabilities of some ids, chunk by chunk.

    Args:
        ids: [T, K] int64 in [0, V).
        width: n, outputs per token.
        compute: (the chunk's tokens, the policy's log-probabilities [C, K] of their ids) -> [C, n].
    """

    ids: Tensor
    width: int
    compute: Callable[[slice, Tensor], Tensor]

    @staticmethod
    def divergences(top_logprobs: TopK, kinds: tuple[str, ...]) -> "AuxiliaryOutputs":
        """Return the top-K divergences of these kinds (`objectives.TOPK`), one column each."""

        def compute(part: slice, logp: Tensor) -> Tensor:
            return torch.stack([TOPK[kind](logp, top_logprobs.logp[part]) for kind in kinds], -1)

        return AuxiliaryOutputs(top_logprobs.ids, len(kinds), compute)


class Chunk:
    """A chunk's logits; with auxiliary outputs, also the logits of their ids relative to the target's.

    Args:
        head: the output layer.
        hidden: [T, H].
        target: [T].
        part: the chunk's tokens.
        auxiliary: outputs computed from the same logits, or None.
        for_gradient: whether to keep the derivative of a soft cap.

    Attributes:
        logits: [C, V], before the factor `head.steepness`; the row kernels overwrite them.
        exact: {"exact": (ids, float32 logits)} where `logits` are rounded, else empty.
        derivative: [C, V], the soft cap's, or None.
    """

    def __init__(
        self,
        head: ChunkedHead,
        hidden: Tensor,
        target: Tensor,
        part: slice,
        auxiliary: AuxiliaryOutputs | None,
        for_gradient: bool,
    ) -> None:
        ids = target[part, None] if auxiliary is None else torch.cat([target[part, None], auxiliary.ids[part]], 1)
        self.logits, self.exact = head.linear(hidden[part], ids)
        self.derivative: Tensor | None = None
        if head.soft_cap is not None:
            self.derivative = torch.empty_like(self.logits) if for_gradient else None
            head.cap(self.logits, self.derivative)
            for _, full in self.exact.values():
                head.cap(full)
        self._part, self._auxiliary = part, auxiliary
        if auxiliary is not None:  # before the row kernels overwrite the logits
            z = self.exact["exact"][1] if self.exact else self.logits.gather(1, ids)
            self._relative = (z[:, 1:] - z[:, :1]).mul_(head.steepness)

    def auxiliary(self, logp: Tensor) -> Tensor:
        """Return the auxiliary outputs [C, n], given the targets' log-probabilities [C]."""
        assert self._auxiliary is not None
        return self._auxiliary.compute(self._part, (self._relative + logp[:, None]).clamp_(max=0))

    def uncapped(self, slopes: Tensor) -> Tensor:
        """Return the slopes [C, V] with respect to the logits before the soft cap, given those after it."""
        return slopes if self.derivative is None else slopes.mul_(self.derivative)
