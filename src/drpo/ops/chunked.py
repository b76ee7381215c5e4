"""The head operator in chunks of tokens: the logits of one chunk at a time, [C, V], in one buffer.

With z = weight hidden / temperature, p = softmax(z) and g = d loss / d logp, a token-wise loss has

    d loss / d hidden_t = -(g_t / temperature) weight^T (p_t - onehot_t)
    d loss / d weight   = -sum_t (p_t - onehot_t) (g_t / temperature) hidden_t^T

so g only scales rows of the small matrices. The fused loss therefore needs each logit once: product, softmax, the
objective on the chunk's tokens, two products; the recomputing form makes the logits again in the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drpo.objectives.contract import Objective, value_and_gradient
from drpo.ops import rows, triton
from drpo.types import Tokens

CHUNK_BYTES = {"cpu": 30 * 2**20, "cuda": 2**30}
"""Logits held at once where the caller names no chunk: enough for the products, and flat in V and T."""

BLOCK = 2048
"""Words done together in a product on a CPU: the block of the weight and of its gradient stays in the cache."""

ROUNDED = (torch.bfloat16, torch.float16)


def _rows(logits: Tensor) -> ModuleType:
    """Return the kernels where they run on these logits; PyTorch's operations elsewhere, and of any but float32."""
    return triton if logits.dtype == torch.float32 and triton.supported(logits.device) else rows


@dataclass(frozen=True, eq=False)
class _Head:
    """The output embedding in the precision of the products, and what the chunks of its logits need.

    Args:
        weight: [V, H].
        scale: 1 / temperature.
        chunk: tokens per chunk.
        buffer: [chunk, V], reused for every chunk: memory that was touched before costs no page faults. None where the
            product makes float32 logits of rounded inputs by itself.
    """

    weight: Tensor
    scale: float
    chunk: int
    buffer: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, temperature: float, chunk: int | None) -> "_Head":
        low = weight.detach().to(hidden.dtype)
        widens = low.is_cuda and low.dtype in ROUNDED
        logit_bytes = 4 if widens else low.element_size()
        most = chunk or max(1, CHUNK_BYTES.get(hidden.device.type, 2**30) // (len(low) * logit_bytes))
        n_chunks = max(1, -(-len(hidden) // most))
        size = -(-len(hidden) // n_chunks)
        return _Head(low, 1 / temperature, size, None if widens else low.new_empty(size, len(low)))

    def chunks(self, n: int) -> Iterator[slice]:
        return (slice(i, i + self.chunk) for i in range(0, n, max(1, self.chunk)))

    def logits(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[C, V] before the temperature, and where they are rounded the targets' own [C] in full, as "exact"."""
        if self.buffer is None:
            return torch.mm(hidden, self.weight.T, out_dtype=torch.float32), {}
        out = self.buffer[: len(hidden)]
        for words in _blocks(self.weight):
            torch.mm(hidden, self.weight[words].T, out=out[:, words])
        if out.dtype not in ROUNDED:
            return out, {}
        # A rounded logit moves log p by as much (0.06 at a logit of 20); of the target that can be had exactly.
        return out, {"exact": (hidden.float() * self.weight[target].float()).sum(-1)}


def _blocks(weight: Tensor) -> Iterator[slice]:
    size = BLOCK if weight.device.type == "cpu" else len(weight)
    return (slice(i, i + size) for i in range(0, len(weight), size))


def _per_token(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Room for two figures of each token, in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), dtype=wide)


class _Gradients:
    """d hidden [T, H] and d weight [V, H], whichever are wanted, filled chunk by chunk.

    The weight's is summed in float32 or wider: a sum over all tokens in bfloat16 would stop growing after 256 terms.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        self._empty = True

    def add(self, head: _Head, part: slice, hidden: Tensor, slopes: Tensor, factor: Tensor | None) -> None:
        """Add a chunk whose d logits are `factor` [C] (None: 1) times `slopes` [C, V]."""
        if self.hidden is not None:
            out = torch.mm(slopes, head.weight, out=self.hidden[part])
            if factor is not None:
                out.mul_(factor[:, None])
        if self.weight is not None:
            scaled = hidden if factor is None else (hidden * factor[:, None]).to(hidden.dtype)
            if slopes.dtype == self.weight.dtype:
                torch.addmm(self.weight, slopes.T, scaled, beta=0 if self._empty else 1, out=self.weight)
            else:
                for words in _blocks(head.weight):
                    product = slopes[:, words].T @ scaled
                    self.weight[words].copy_(product) if self._empty else self.weight[words].add_(product)
            self._empty = False

    def results(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Both, the weight's in `dtype`."""
        if self.weight is None:
            return self.hidden, None
        return self.hidden, self.weight.zero_().to(dtype) if self._empty else self.weight.to(dtype)


class _LinearLogprob(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, chunk: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature, ctx.chunk = temperature, chunk
        logp, entropy = _per_token(hidden)
        head = _Head.of(hidden, weight, temperature, chunk)
        for part in head.chunks(len(hidden)):
            logits, exact = head.logits(hidden[part], target[part])
            logp[part], entropy[part] = _rows(logits).statistics(logits, target[part], head.scale, **exact)
        return logp, entropy

    @staticmethod
    @once_differentiable  # its inputs' slopes are taken as constants, so a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        grad_logp, grad_entropy = grads
        with_entropy = bool(grad_entropy.any())
        head = _Head.of(hidden, weight, ctx.temperature, ctx.chunk)
        found = _Gradients(hidden, weight, ctx.needs_input_grad)
        for part in head.chunks(len(hidden)):
            logits, exact = head.logits(hidden[part], target[part])
            up, factor = grad_logp[part] * head.scale, None
            if with_entropy:
                down = grad_entropy[part] * head.scale
                slopes = _rows(logits).slope(logits, target[part], head.scale, up, down, hidden.dtype, **exact)
            else:
                slopes, _, _ = _rows(logits).residual(logits, target[part], head.scale, hidden.dtype, **exact)
                factor = -up
            found.add(head, part, hidden[part], slopes, factor)
        return *found.results(weight.dtype), None, None, None


class _Given(NamedTuple):
    """What the fused loss gets that has no gradient."""

    target: Tensor
    objective: Objective
    behavior_logp: Tensor
    advantage: Tensor
    sequence: Tensor
    token_weight: Tensor
    temperature: float
    chunk: int | None

    def tokens(self, part: slice, logp: Tensor) -> Tokens:
        keep = torch.ones_like(logp, dtype=torch.bool)
        return Tokens(logp, self.behavior_logp[part], self.advantage[part], keep, self.sequence[part])


class _LinearPolicyLoss(torch.autograd.Function):
    """The loss with its gradient made in the forward pass; the backward pass only hands it over."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, given: _Given
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        head = _Head.of(hidden, weight, given.temperature, given.chunk)
        found = _Gradients(hidden, weight, ctx.needs_input_grad)
        logp, entropy = _per_token(hidden)
        loss = logp.new_zeros(())
        metrics: dict[str, list[Tensor]] = {}
        for part in head.chunks(len(hidden)):
            logits, exact = head.logits(hidden[part], given.target[part])
            slopes, logp[part], entropy[part] = _rows(logits).residual(
                logits, given.target[part], head.scale, hidden.dtype, **exact
            )
            seen, slope = value_and_gradient(given.objective, given.tokens(part, logp[part]))
            loss += (given.token_weight[part] * seen.loss).sum()
            for name, values in seen.metrics.items():
                metrics.setdefault(name, []).append(values)
            found.add(head, part, hidden[part], slopes, -head.scale * given.token_weight[part] * slope)
        ctx.gradients = found.results(weight.dtype)
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy, {name: torch.cat(values) for name, values in metrics.items()}

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope, *_) = grads
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradient was handed over; a second backward pass has none")
        # Held by nobody else, the weight's gradient becomes its .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if float(slope) == 1:  # the usual case: a pass over the weight's gradient is saved
            return *gradients, None
        return *(None if g is None else g * slope for g in gradients), None


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `drpo.ops.linear_logprob`."""
    logp, entropy = _LinearLogprob.apply(hidden, weight, target, temperature, chunk)  # type: ignore[no-untyped-call]
    return logp, entropy


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    *,
    behavior_logp: Tensor,
    advantage: Tensor,
    sequence: Tensor,
    token_weight: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `drpo.ops.linear_policy_loss`, for a token-wise objective and tokens that are all trained."""
    given = _Given(target, objective, behavior_logp, advantage, sequence, token_weight, temperature, chunk)
    loss, logp, entropy, metrics = _LinearPolicyLoss.apply(hidden, weight, given)  # type: ignore[no-untyped-call]
    return loss, logp, {**metrics, "entropy": entropy}
