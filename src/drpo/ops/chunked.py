"""The head operator in chunks of tokens: the logits of one chunk at a time, [C, V], in one buffer.

With z = weight hidden / temperature, p = softmax(z) and g = d loss / d logp, a token-wise loss has

    d loss / d hidden_t = -(g_t / temperature) weight^T (p_t - onehot_t)
    d loss / d weight   = -sum_t (p_t - onehot_t) (g_t / temperature) hidden_t^T

so g only scales rows of the small matrices. The fused loss therefore needs each logit once: product, softmax, the
objective on the chunk's tokens, two products; the recomputing form makes the logits again in the backward pass.

Log-probabilities of other words than the target, for divergences from the sampler, come from the same logits: taken out
before the rows are overwritten, as differences from the target's, and completed with the target's log-probability.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drpo.objectives.contract import Objective, differentiated, unchecked, value_and_gradient
from drpo.objectives.divergence import TOPK
from drpo.ops import rows, triton
from drpo.types import Tokens, TopK

CHUNK_BYTES = {"cpu": 30 * 2**20, "cuda": 2**30}
"""Logits held at once where the caller names no chunk: enough for the products, and flat in V and T."""

BLOCK = 2048
"""Words done together in a product on a CPU: the block of the weight and of its gradient stays in the cache."""

ROUNDED = (torch.bfloat16, torch.float16)

GATHERED = 2**22
"""Most elements of the weight's rows that are made float32 at once, for logits in full."""

DENSE = 1 / 8
"""Share of the vocabulary from which on a product with all of it is cheaper than fetching row after row."""


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

    def logits(self, hidden: Tensor, words: Tensor) -> tuple[Tensor, dict[str, rows.Exact]]:
        """[C, V] before the temperature, and where they are rounded those of `words` [C, n] in full, as "exact"."""
        if self.buffer is None:
            return torch.mm(hidden, self.weight.T, out_dtype=torch.float32), {}
        out = self.buffer[: len(hidden)]
        for block in _blocks(self.weight):
            torch.mm(hidden, self.weight[block].T, out=out[:, block])
        if out.dtype not in ROUNDED:
            return out, {}
        # A rounded logit moves log p by as much (0.06 at a logit of 20); of a few words it can be had in full.
        return out, {"exact": (words, self._in_full(hidden.float(), words))}

    def _in_full(self, hidden: Tensor, words: Tensor) -> Tensor:
        """[C, n] float32: the logits of `words` [C, n], from few of the weight's rows at a time."""
        if words.shape[1] > DENSE * len(self.weight):
            everything = torch.cat([hidden @ self.weight[block].float().T for block in _blocks(self.weight)], 1)
            return everything.gather(1, words)
        size = max(1, GATHERED // max(1, hidden.numel()))
        parts = words.split(size, 1)
        return torch.cat([(self.weight[part].float() @ hidden[:, :, None])[..., 0] for part in parts], 1)


def _blocks(weight: Tensor) -> Iterator[slice]:
    size = BLOCK if weight.device.type == "cpu" else len(weight)
    return (slice(i, i + size) for i in range(0, len(weight), size))


@dataclass(frozen=True, eq=False)
class Aside:
    """What else is made of each chunk's logits, without a gradient.

    Args:
        ids: [T, K] int64 in [0, V).
        width: n.
        make: (places, [C, K] the policy's log-probabilities of their ids) -> [C, n].
    """

    ids: Tensor
    width: int
    make: Callable[[slice, Tensor], Tensor]

    @staticmethod
    def divergences(top: TopK, kinds: tuple[str, ...]) -> "Aside":
        """Those of `objectives.TOPK` with these names, a column each."""

        def make(places: slice, logp: Tensor) -> Tensor:
            return torch.stack([TOPK[kind](logp, top.logp[places]) for kind in kinds], -1)

        return Aside(top.ids, len(kinds), make)


class _Chunk:
    """A chunk's logits, and where an `Aside` wants them, how far above the target's those of its ids were.

    Args:
        logits: [C, V], before the temperature.
        exact: those that are known to more digits, or nothing.
    """

    def __init__(self, head: _Head, hidden: Tensor, target: Tensor, part: slice, aside: Aside | None) -> None:
        words = target[part, None] if aside is None else torch.cat([target[part, None], aside.ids[part]], 1)
        self.logits, self.exact = head.logits(hidden[part], words)
        self._part, self._aside = part, aside
        if aside is not None:  # now, because the row kernels overwrite the logits
            z = self.exact["exact"][1] if self.exact else self.logits.gather(1, words)
            self._above = (z[:, 1:] - z[:, :1]).mul_(head.scale)

    def aside(self, logp: Tensor) -> Tensor:
        """[C, n] what the aside makes, given the targets' log-probabilities [C]."""
        assert self._aside is not None
        return self._aside.make(self._part, (self._above + logp[:, None]).clamp_(max=0))


def _per_token(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Room for two figures of each token, in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), dtype=wide)


class _Gradients:
    """d hidden [T, H] and d weight [V, H], whichever are wanted, filled chunk by chunk.

    The weight's is summed in float32 or wider: a sum over all tokens in bfloat16 would stop growing after 256 terms.
    A 16-bit product never sees the tokens' factors as they are: a weight of 2.4e-7 would round to 0 in float16.
    `hidden` is multiplied by them at the end; what goes into the weight's product is brought to a common size first.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        self._factor = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        self._dtype = weight.dtype
        self._empty = True

    def add(self, head: _Head, part: slice, hidden: Tensor, slopes: Tensor, factor: Tensor) -> None:
        """Add a chunk whose d logits are `factor` [C] times `slopes` [C, V]."""
        self._factor[part] = factor
        if self.hidden is not None:
            torch.mm(slopes, head.weight, out=self.hidden[part])
        if self.weight is not None:
            if slopes.dtype == self.weight.dtype:
                scaled = (hidden * factor[:, None]).to(hidden.dtype)
                torch.addmm(self.weight, slopes.T, scaled, beta=0 if self._empty else 1, out=self.weight)
            else:
                self._add_rounded(head, slopes, *_normalised(hidden, factor))
            self._empty = False

    def _add_rounded(self, head: _Head, slopes: Tensor, scaled: Tensor, unit: Tensor) -> None:
        """Add unit * slopes^T scaled, a product in 16 bits, to the weight's."""
        assert self.weight is not None
        for words in _blocks(head.weight):
            product = slopes[:, words].T @ scaled
            if self._empty:
                torch.mul(product, unit, out=self.weight[words])
            else:
                self.weight[words].addcmul_(product, unit)

    def results(self, slope: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Both, times `slope`, a scalar (None: 1), in the dtypes of `hidden` and `weight`; to be asked for once."""
        if self.hidden is not None:
            self.hidden.mul_((self._factor if slope is None else self._factor * slope)[:, None])
        if self.weight is None:
            return self.hidden, None
        if self._empty:
            self.weight.zero_()
        if slope is not None:
            self.weight.mul_(slope)
        return self.hidden, self.weight.to(self._dtype)


def _normalised(hidden: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return `hidden` [C, H] times `factor` [C] over a unit, in 16 bits, and the unit [1], a power of 2, float32.

    In that unit no sum of C terms reaches 2^15, so that float16 holds it, and the largest uses most of its range.
    """
    wide = (hidden * factor[:, None]).float()
    size = wide.abs().amax() * len(wide)
    unit = torch.exp2((torch.frexp(size).exponent - 15).clamp(-100, 100).float())[None]
    return wide.div_(unit).to(hidden.dtype), unit


Backward = Callable[..., tuple[Tensor | None, ...]]


def _once(backward: Backward) -> Backward:
    """A backward pass whose results refuse a derivative of their own; `ctx.saved_tensors` begins with the inputs."""

    def guarded(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:2] if torch.is_grad_enabled() else ()
        with torch.no_grad():
            found = backward(ctx, *grads)
        marked = (g if g is None else differentiated(g, x) for g, x in zip(found, inputs, strict=False))
        return *marked, *found[len(inputs) :]

    return guarded


class _LinearLogprob(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        chunk: int | None,
        aside: Aside | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature, ctx.chunk, ctx.aside = temperature, chunk, aside
        logp, entropy = _per_token(hidden)
        made = None if aside is None else logp.new_empty(len(logp), aside.width)
        head = _Head.of(hidden, weight, temperature, chunk)
        for part in head.chunks(len(hidden)):
            here = _Chunk(head, hidden, target, part, aside)
            logp[part], entropy[part] = _rows(here.logits).statistics(
                here.logits, target[part], head.scale, **here.exact
            )
            if made is not None:
                made[part] = here.aside(logp[part])
                ctx.mark_non_differentiable(made)
        return logp, entropy, made

    @staticmethod
    @_once  # its inputs' slopes are taken as constants, so a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        grad_logp, grad_entropy, _ = grads
        with_entropy = bool(grad_entropy.any())
        head = _Head.of(hidden, weight, ctx.temperature, ctx.chunk)
        found = _Gradients(hidden, weight, ctx.needs_input_grad)
        for part in head.chunks(len(hidden)):
            here = _Chunk(head, hidden, target, part, ctx.aside)
            given = (here.logits, target[part], head.scale)
            up = grad_logp[part] * head.scale
            if with_entropy:
                down = grad_entropy[part] * head.scale
                size = torch.maximum(up.abs(), down.abs())
                factor = torch.where(size > 0, size, 1)  # slopes are rounded to 16 bits, so none may be tiny
                slopes = _rows(here.logits).slope(*given, up / factor, down / factor, hidden.dtype, **here.exact)
            else:
                slopes, _, _ = _rows(here.logits).residual(*given, hidden.dtype, **here.exact)
                factor = -up
            found.add(head, part, hidden[part], slopes, factor)
        return *found.results(), None, None, None, None


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
    aside: Aside | None

    def tokens(self, part: slice, logp: Tensor, divergence: Tensor | None) -> Tokens:
        keep = torch.ones_like(logp, dtype=torch.bool)
        return unchecked(
            logp=logp,
            behavior_logp=self.behavior_logp[part],
            advantage=self.advantage[part],
            keep=keep,
            sequence=self.sequence[part],
            divergence=divergence,
        )


class _LinearPolicyLoss(torch.autograd.Function):
    """The loss with its gradient made in the forward pass; the backward pass only hands it over."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, given: _Given
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        ctx.save_for_backward(hidden, weight)
        head = _Head.of(hidden, weight, given.temperature, given.chunk)
        found = _Gradients(hidden, weight, ctx.needs_input_grad)
        logp, entropy = _per_token(hidden)
        divergence = None if given.aside is None else torch.empty_like(logp)
        loss = logp.new_zeros(())
        metrics: dict[str, list[Tensor]] = {}
        for part in head.chunks(len(hidden)):
            here = _Chunk(head, hidden, given.target, part, given.aside)
            slopes, logp[part], entropy[part] = _rows(here.logits).residual(
                here.logits, given.target[part], head.scale, hidden.dtype, **here.exact
            )
            if divergence is not None:
                divergence[part] = here.aside(logp[part])[:, 0]
            moved = None if divergence is None else divergence[part]
            seen, slope = value_and_gradient(given.objective, given.tokens(part, logp[part], moved))
            loss += (given.token_weight[part] * seen.loss).sum()
            for name, values in seen.metrics.items():
                metrics.setdefault(name, []).append(values)
            found.add(head, part, hidden[part], slopes, -head.scale * given.token_weight[part] * slope)
        ctx.gradients = found
        ctx.mark_non_differentiable(*(x for x in (logp, entropy, divergence) if x is not None))
        return loss, logp, entropy, divergence, {name: torch.cat(values) for name, values in metrics.items()}

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope, *_) = grads
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradient was handed over; a second backward pass has none")
        # Held by nobody else, the weight's gradient becomes its .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        # A slope of 1 is the usual case: a pass over the weight's gradient is saved.
        return *gradients.results(None if float(slope) == 1 else slope), None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
    aside: Aside | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `drpo.ops.linear_logprob`, and what `aside` makes on the way, [T, n]."""
    found: tuple[Tensor, Tensor, Tensor | None]
    found = _LinearLogprob.apply(hidden, weight, target, temperature, chunk, aside)  # type: ignore[no-untyped-call]
    return found


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
    aside: Aside | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As `drpo.ops.linear_policy_loss`, for a token-wise objective and tokens that are all trained.

    `aside` makes the divergence that the objective reads, [T, 1], where it reads one.
    """
    given = _Given(target, objective, behavior_logp, advantage, sequence, token_weight, temperature, chunk, aside)
    loss, logp, entropy, divergence, metrics = _LinearPolicyLoss.apply(hidden, weight, given)  # type: ignore[no-untyped-call]
    return loss, logp, {**metrics, "entropy": entropy} | ({} if divergence is None else {"divergence": divergence})
