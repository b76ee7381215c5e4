"""The head operator in chunks of tokens: the logits of one chunk at a time, [C, V], in one buffer.

With z = steepness (weight hidden + bias), steepness = scale / temperature, p = softmax(z) and g = d loss / d logp, a
token-wise loss has

    d loss / d hidden_t = -(g_t steepness) weight^T (p_t - onehot_t)
    d loss / d weight   = -sum_t (p_t - onehot_t) (g_t steepness) hidden_t^T
    d loss / d bias     = -sum_t (p_t - onehot_t) (g_t steepness)

so g only scales rows of the small matrices. The fused loss therefore needs each logit once: product, softmax, the
objective on the chunk's tokens, two products; the recomputing form makes the logits again in the backward pass. A soft
cap is applied between the product and the softmax, and multiplies p - onehot by its derivative, word by word.

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
from drpo.ops.head import Head
from drpo.ops.records import PolicyLoss, SampledTokens
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


class _How(NamedTuple):
    """What the operators get besides tensors that may have a gradient: scale and soft cap are the head's."""

    scale: float
    soft_cap: float | None
    temperature: float
    chunk: int | None
    aside: "Aside | None"

    @staticmethod
    def of(head: Head, temperature: float, chunk: int | None, aside: "Aside | None") -> "_How":
        return _How(head.scale, head.soft_cap, temperature, chunk, aside)


@dataclass(frozen=True, eq=False)
class _Logits:
    """A head in the precision of the products, and what the chunks of its logits need.

    Args:
        weight: [V, H].
        bias: [V] or None.
        steepness: what the softmax multiplies the logits by: scale / temperature, or 1 / temperature with a soft cap,
            which is applied to the scaled logits.
        scale: of the head; applied here where there is a soft cap.
        soft_cap: of the head, or None.
        chunk: tokens per chunk.
        buffer: [chunk, V], reused for every chunk: memory that was touched before costs no page faults. None where the
            product makes float32 logits of rounded inputs by itself.
    """

    weight: Tensor
    bias: Tensor | None
    steepness: float
    scale: float
    soft_cap: float | None
    chunk: int
    buffer: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> "_Logits":
        low = weight.detach().to(hidden.dtype)
        widens = low.is_cuda and low.dtype in ROUNDED
        logit_bytes = 4 if widens else low.element_size()
        most = how.chunk or max(1, CHUNK_BYTES.get(hidden.device.type, 2**30) // (len(low) * logit_bytes))
        n_chunks = max(1, -(-len(hidden) // most))
        size = -(-len(hidden) // n_chunks)
        return _Logits(
            weight=low,
            bias=None if bias is None else bias.detach().to(hidden.dtype),
            steepness=(how.scale if how.soft_cap is None else 1) / how.temperature,
            scale=how.scale,
            soft_cap=how.soft_cap,
            chunk=size,
            buffer=None if widens else low.new_empty(size, len(low)),
        )

    def chunks(self, n: int) -> Iterator[slice]:
        return (slice(i, i + self.chunk) for i in range(0, n, max(1, self.chunk)))

    def linear(self, hidden: Tensor, words: Tensor) -> tuple[Tensor, dict[str, rows.Exact]]:
        """[C, V] weight hidden + bias, and where they are rounded those of `words` [C, n] in full, as "exact"."""
        if self.buffer is None:
            out = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
            return (out if self.bias is None else out.add_(self.bias)), {}
        out = self.buffer[: len(hidden)]
        for block in _blocks(self.weight):
            if self.bias is None:
                torch.mm(hidden, self.weight[block].T, out=out[:, block])
            else:
                torch.addmm(self.bias[block], hidden, self.weight[block].T, out=out[:, block])
        if out.dtype not in ROUNDED:
            return out, {}
        # A rounded logit moves log p by as much (0.06 at a logit of 20); of a few words it can be had in full.
        full = self._in_full(hidden.float(), words)
        return out, {"exact": (words, full if self.bias is None else full + self.bias.float()[words])}

    def cap(self, x: Tensor, derivative: Tensor | None = None) -> None:
        """Replace x [C, n] by soft_cap tanh(scale x / soft_cap), and fill `derivative` [C, n] with that in x."""
        assert self.soft_cap is not None
        for start in range(0, x.shape[1], BLOCK):
            here = slice(start, start + BLOCK)
            wide = x[:, here].to(torch.promote_types(x.dtype, torch.float32))
            share = torch.tanh(wide * (self.scale / self.soft_cap))
            x[:, here] = share * self.soft_cap
            if derivative is not None:
                derivative[:, here] = (1 - share.square()) * self.scale

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
    """A chunk's logits, and where an `Aside` reads them, its ids' logits relative to the target's.

    Args:
        head: of the logits.
        hidden: [T, H].
        target: [T].
        part: the chunk's tokens.
        aside: what else is made of the logits, or None.
        for_gradient: whether the derivative of a soft cap will be asked for.

    Attributes:
        logits: [C, V], before the softmax multiplies them by `head.steepness`; the row kernels overwrite them.
        exact: those that are known to more digits, or nothing.
        derivative: [C, V] of the soft cap, or None.
    """

    def __init__(
        self, head: _Logits, hidden: Tensor, target: Tensor, part: slice, aside: Aside | None, for_gradient: bool
    ) -> None:
        words = target[part, None] if aside is None else torch.cat([target[part, None], aside.ids[part]], 1)
        self.logits, self.exact = head.linear(hidden[part], words)
        self.derivative: Tensor | None = None
        if head.soft_cap is not None:
            self.derivative = torch.empty_like(self.logits) if for_gradient else None
            head.cap(self.logits, self.derivative)
            for _, full in self.exact.values():
                head.cap(full)
        self._part, self._aside = part, aside
        if aside is not None:  # now, because the row kernels overwrite the logits
            z = self.exact["exact"][1] if self.exact else self.logits.gather(1, words)
            self._above = (z[:, 1:] - z[:, :1]).mul_(head.steepness)

    def aside(self, logp: Tensor) -> Tensor:
        """[C, n] what the aside makes, given the targets' log-probabilities [C]."""
        assert self._aside is not None
        return self._aside.make(self._part, (self._above + logp[:, None]).clamp_(max=0))

    def uncapped(self, slopes: Tensor) -> Tensor:
        """Turn slopes [C, V] in the logits into slopes in what the soft cap was applied to."""
        return slopes if self.derivative is None else slopes.mul_(self.derivative)


def _per_token(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Room for two figures of each token, in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), dtype=wide)


class _Gradients:
    """d hidden [T, H], d weight [V, H] and d bias [V], whichever are wanted, filled chunk by chunk.

    Those of the head are summed in float32 or wider: a sum over all tokens in bfloat16 would stop growing after 256
    terms. A 16-bit product never sees the tokens' factors as they are: a weight of 2.4e-7 would round to 0 in float16.
    `hidden` is multiplied by them at the end; what goes into the weight's product is brought to a common size first.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        self.bias = torch.empty(len(weight), 1, dtype=wide, device=weight.device) if wanted[2] else None
        self._factor = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        self._dtypes = weight.dtype, None if bias is None else bias.dtype
        self._empty = True

    def add(self, head: _Logits, part: slice, hidden: Tensor, slopes: Tensor, factor: Tensor) -> None:
        """Add a chunk whose d (weight hidden + bias) are `factor` [C] times `slopes` [C, V]."""
        self._factor[part] = factor
        if self.hidden is not None:
            torch.mm(slopes, head.weight, out=self.hidden[part])
        if self.weight is not None:
            self._add(self.weight, head, slopes, hidden, factor)
        if self.bias is not None:
            self._add(self.bias, head, slopes, torch.ones_like(hidden[:, :1]), factor)
        self._empty = False

    def _add(self, total: Tensor, head: _Logits, slopes: Tensor, inputs: Tensor, factor: Tensor) -> None:
        """Add slopes^T (factor inputs) to `total` [V, n], `inputs` being [C, n]."""
        if slopes.dtype == total.dtype:
            scaled = (inputs * factor[:, None]).to(inputs.dtype)
            torch.addmm(total, slopes.T, scaled, beta=0 if self._empty else 1, out=total)
            return
        scaled, unit = _normalised(inputs, factor)
        for words in _blocks(head.weight):
            product = slopes[:, words].T @ scaled
            if self._empty:
                torch.mul(product, unit, out=total[words])
            else:
                total[words].addcmul_(product, unit)

    def results(self, slope: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """All three, times `slope`, a scalar (None: 1), in the inputs' dtypes; to be asked for once."""
        if self.hidden is not None:
            self.hidden.mul_((self._factor if slope is None else self._factor * slope)[:, None])
        for total in (self.weight, self.bias):
            if total is not None and self._empty:
                total.zero_()
            if total is not None and slope is not None:
                total.mul_(slope)
        of_weight, of_bias = self._dtypes
        weight = None if self.weight is None else self.weight.to(of_weight)
        return self.hidden, weight, None if self.bias is None else self.bias[:, 0].to(of_bias)


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
        inputs = ctx.saved_tensors[:3] if torch.is_grad_enabled() else ()
        with torch.no_grad():
            found = backward(ctx, *grads)
        marked = (g if g is None else differentiated(g, x) for g, x in zip(found, inputs, strict=False))
        return *marked, *found[len(inputs) :]

    return guarded


class _LinearLogprob(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, how: _How
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.how = how
        logp, entropy = _per_token(hidden)
        made = None if how.aside is None else logp.new_empty(len(logp), how.aside.width)
        head = _Logits.of(hidden, weight, bias, how)
        for part in head.chunks(len(hidden)):
            here = _Chunk(head, hidden, target, part, how.aside, for_gradient=False)
            logp[part], entropy[part] = _rows(here.logits).statistics(
                here.logits, target[part], head.steepness, **here.exact
            )
            if made is not None:
                made[part] = here.aside(logp[part])
                ctx.mark_non_differentiable(made)
        return logp, entropy, made

    @staticmethod
    @_once  # its inputs' slopes are taken as constants, so a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        grad_logp, grad_entropy, _ = grads
        with_entropy = bool(grad_entropy.any())
        how: _How = ctx.how
        head = _Logits.of(hidden, weight, bias, how)
        found = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for part in head.chunks(len(hidden)):
            here = _Chunk(head, hidden, target, part, how.aside, for_gradient=True)
            given = (here.logits, target[part], head.steepness)
            up = grad_logp[part] * head.steepness
            if with_entropy:
                down = grad_entropy[part] * head.steepness
                size = torch.maximum(up.abs(), down.abs())
                factor = torch.where(size > 0, size, 1)  # slopes are rounded to 16 bits, so none may be tiny
                slopes = _rows(here.logits).slope(*given, up / factor, down / factor, hidden.dtype, **here.exact)
            else:
                slopes, _, _ = _rows(here.logits).residual(*given, hidden.dtype, **here.exact)
                factor = -up
            found.add(head, part, hidden[part], here.uncapped(slopes), factor)
        return *found.results(), None, None


class _Tokenwise(NamedTuple):
    """The tokens of a chunk as the objective reads them."""

    sampled: SampledTokens
    objective: Objective

    def tokens(self, part: slice, logp: Tensor, divergence: Tensor | None) -> Tokens:
        return unchecked(
            logp=logp,
            behavior_logp=self.sampled.behavior_logp[part],
            advantage=self.sampled.advantage[part],
            keep=torch.ones_like(logp, dtype=torch.bool),
            sequence=self.sampled.sequence[part],
            divergence=divergence,
        )


class _LinearPolicyLoss(torch.autograd.Function):
    """The loss with its gradient made in the forward pass; the backward pass only hands it over."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, given: _Tokenwise, how: _How
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        ctx.save_for_backward(hidden, weight, bias)
        head = _Logits.of(hidden, weight, bias, how)
        found = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        logp, entropy = _per_token(hidden)
        gradient = torch.empty_like(logp)
        divergence = None if how.aside is None else torch.empty_like(logp)
        loss = logp.new_zeros(())
        metrics: dict[str, list[Tensor]] = {}
        for part in head.chunks(len(hidden)):
            target = given.sampled.target[part]
            here = _Chunk(head, hidden, given.sampled.target, part, how.aside, for_gradient=True)
            slopes, logp[part], entropy[part] = _rows(here.logits).residual(
                here.logits, target, head.steepness, hidden.dtype, **here.exact
            )
            if divergence is not None:
                divergence[part] = here.aside(logp[part])[:, 0]
            moved = None if divergence is None else divergence[part]
            seen, gradient[part] = value_and_gradient(given.objective, given.tokens(part, logp[part], moved))
            counts = given.sampled.weight[part]
            loss += (counts * seen.loss).sum()
            for name, values in seen.metrics.items():
                metrics.setdefault(name, []).append(values)
            found.add(head, part, hidden[part], here.uncapped(slopes), -head.steepness * counts * gradient[part])
        ctx.gradients = found
        ctx.mark_non_differentiable(*(x for x in (logp, entropy, gradient, divergence) if x is not None))
        joined = {name: torch.cat(values) for name, values in metrics.items()}
        return loss, logp, entropy, gradient, divergence, joined

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope, *_) = grads
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradient was handed over; a second backward pass has none")
        # Held by nobody else, the weight's gradient becomes its .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        # A slope of 1 is the usual case: a pass over the weight's gradient is saved.
        return *gradients.results(None if float(slope) == 1 else slope), None, None


def linear_logprob(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
    aside: Aside | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `drpo.ops.linear_logprob`, and what `aside` makes on the way, [T, n]."""
    how = _How.of(head, temperature, chunk, aside)
    found: tuple[Tensor, Tensor, Tensor | None]
    found = _LinearLogprob.apply(hidden, head.weight, head.bias, target, how)  # type: ignore[no-untyped-call]
    return found


def linear_policy_loss(
    hidden: Tensor,
    head: Head,
    sampled: SampledTokens,
    objective: Objective,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    aside: Aside | None = None,
) -> PolicyLoss:
    """As `drpo.ops.linear_policy_loss`, for a token-wise objective and tokens that are all trained.

    `aside` makes the divergence that the objective reads, [T, 1], where it reads one.
    """
    how = _How.of(head, temperature, chunk, aside)
    columns = _LinearPolicyLoss.apply(hidden, head.weight, head.bias, _Tokenwise(sampled, objective), how)  # type: ignore[no-untyped-call]
    loss, logp, entropy, gradient, divergence, metrics = columns
    return PolicyLoss(loss, logp, entropy, gradient, metrics, divergence)
