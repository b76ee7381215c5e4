"""The head operator in chunks of tokens: log-probabilities and gradients from one chunk's logits at a time.

With z = steepness (weight hidden + bias), steepness = scale / temperature, p = softmax(z) and g = d loss / d logp, a
token-wise loss has

    d loss / d hidden_t = -(g_t steepness) weight^T (p_t - onehot_t)
    d loss / d weight   = -sum_t (p_t - onehot_t) (g_t steepness) hidden_t^T
    d loss / d bias     = -sum_t (p_t - onehot_t) (g_t steepness)

so g only scales rows of the small matrices. The fused loss therefore needs each logit once: product, softmax, the
objective on the chunk's tokens, two products. `linear_logprob` computes the logits again in the backward pass. A soft
cap multiplies p - onehot by its derivative, entry by entry.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drpo.objectives.closed_form import differentiated
from drpo.objectives.contract import Objective, unchecked, value_and_gradient
from drpo.ops import rows, triton
from drpo.ops.chunk_logits import AuxiliaryOutputs, Chunk, ChunkedHead, HeadOptions, blocks
from drpo.ops.head import Head
from drpo.ops.records import PolicyLoss, SampledTokens
from drpo.types import Tokens


def _rows(logits: Tensor) -> ModuleType:
    """Return the Triton kernels for float32 logits on a supported device, PyTorch's operations otherwise."""
    return triton if logits.dtype == torch.float32 and triton.supported(logits.device) else rows


def _per_token(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return two empty columns [T], float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), dtype=wide)


class _Gradients:
    """The gradients of hidden [T, H], weight [V, H] and bias [V], where wanted, accumulated chunk by chunk.

    The head's gradients are summed in float32 or wider: a sum in bfloat16 would stop growing after 256 terms. The
    tokens' factors never enter a 16-bit product unscaled: a weight of 2.4e-7 would round to 0 in float16. The gradient
    of `hidden` is multiplied by the factors at the end; the inputs of the weight's product are normalised first.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
        self.bias = torch.empty(len(weight), 1, dtype=wide, device=weight.device) if wanted[2] else None
        self._factor = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        self._dtypes = weight.dtype, None if bias is None else bias.dtype
        self._empty = True

    def add(self, head: ChunkedHead, part: slice, hidden: Tensor, slopes: Tensor, factor: Tensor) -> None:
        """Add a chunk; d (weight hidden + bias) is `factor` [C] times `slopes` [C, V]."""
        self._factor[part] = factor
        if self.hidden is not None:
            torch.mm(slopes, head.weight, out=self.hidden[part])
        if self.weight is not None:
            self._add(self.weight, head, slopes, hidden, factor)
        if self.bias is not None:
            self._add(self.bias, head, slopes, torch.ones_like(hidden[:, :1]), factor)
        self._empty = False

    def _add(self, total: Tensor, head: ChunkedHead, slopes: Tensor, inputs: Tensor, factor: Tensor) -> None:
        """Add slopes^T (factor inputs) to `total` [V, n]; `inputs` is [C, n]."""
        if slopes.dtype == total.dtype:
            scaled = (inputs * factor[:, None]).to(inputs.dtype)
            torch.addmm(total, slopes.T, scaled, beta=0 if self._empty else 1, out=total)
            return
        scaled, unit = _normalised(inputs, factor)
        for block in blocks(head.weight):
            product = slopes[:, block].T @ scaled
            if self._empty:
                torch.mul(product, unit, out=total[block])
            else:
                total[block].addcmul_(product, unit)

    def results(self, slope: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients times the scalar `slope` (None: 1), in the inputs' dtypes; call once."""
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
    """Wrap a backward pass so that its results refuse a second derivative; the first saved tensors are the inputs."""

    def guarded(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:3] if torch.is_grad_enabled() else ()
        with torch.no_grad():
            slopes = backward(ctx, *grads)
        first_order = (g if g is None else differentiated(g, x) for g, x in zip(slopes, inputs, strict=False))
        return *first_order, *slopes[len(inputs) :]

    return guarded


class _LinearLogprob(torch.autograd.Function):
    """Log-probabilities and entropies; the backward pass computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.options = options
        logp, entropy = _per_token(hidden)
        auxiliary = None if options.auxiliary is None else logp.new_empty(len(logp), options.auxiliary.width)
        head = ChunkedHead.of(hidden, weight, bias, options)
        for part in head.chunks(len(hidden)):
            chunk = Chunk(head, hidden, target, part, options.auxiliary, for_gradient=False)
            logp[part], entropy[part] = _rows(chunk.logits).statistics(
                chunk.logits, target[part], head.steepness, **chunk.exact
            )
            if auxiliary is not None:
                auxiliary[part] = chunk.auxiliary(logp[part])
                ctx.mark_non_differentiable(auxiliary)
        return logp, entropy, auxiliary

    @staticmethod
    @_once  # its inputs' slopes are taken as constants, so a second derivative would be wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target = ctx.saved_tensors
        grad_logp, grad_entropy, _ = grads
        with_entropy = bool(grad_entropy.any())
        options: HeadOptions = ctx.options
        head = ChunkedHead.of(hidden, weight, bias, options)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for part in head.chunks(len(hidden)):
            chunk = Chunk(head, hidden, target, part, options.auxiliary, for_gradient=True)
            arguments = (chunk.logits, target[part], head.steepness)
            up = grad_logp[part] * head.steepness
            if with_entropy:
                down = grad_entropy[part] * head.steepness
                size = torch.maximum(up.abs(), down.abs())
                factor = torch.where(size > 0, size, 1)  # slopes are rounded to 16 bits, so none may be tiny
                slopes = _rows(chunk.logits).slope(*arguments, up / factor, down / factor, hidden.dtype, **chunk.exact)
            else:
                slopes, _, _ = _rows(chunk.logits).residual(*arguments, hidden.dtype, **chunk.exact)
                factor = -up
            gradients.add(head, part, hidden[part], chunk.uncapped(slopes), factor)
        return *gradients.results(), None, None


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
            position=None if self.sampled.position is None else self.sampled.position[part],
            proximal_logp=None if self.sampled.proximal_logp is None else self.sampled.proximal_logp[part],
            score=None if self.sampled.score is None else self.sampled.score[part],
            reference_logp=None if self.sampled.reference_logp is None else self.sampled.reference_logp[part],
        )


class _LinearPolicyLoss(torch.autograd.Function):
    """The loss with its gradient computed in the forward pass; the backward pass only returns it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokenwise: _Tokenwise, options: HeadOptions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        ctx.save_for_backward(hidden, weight, bias)
        head = ChunkedHead.of(hidden, weight, bias, options)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        logp, entropy = _per_token(hidden)
        gradient = torch.empty_like(logp)
        divergence = None if options.auxiliary is None else torch.empty_like(logp)
        loss = logp.new_zeros(())
        metrics: dict[str, list[Tensor]] = {}
        for part in head.chunks(len(hidden)):
            target = tokenwise.sampled.target[part]
            chunk = Chunk(head, hidden, tokenwise.sampled.target, part, options.auxiliary, for_gradient=True)
            slopes, logp[part], entropy[part] = _rows(chunk.logits).residual(
                chunk.logits, target, head.steepness, hidden.dtype, **chunk.exact
            )
            if divergence is not None:
                divergence[part] = chunk.auxiliary(logp[part])[:, 0]
            distance = None if divergence is None else divergence[part]
            tokens = tokenwise.tokens(part, logp[part], distance)
            token_loss, gradient[part] = value_and_gradient(tokenwise.objective, tokens)
            weights = tokenwise.sampled.weight[part]
            loss += (weights * token_loss.loss).sum()
            for name, values in token_loss.metrics.items():
                metrics.setdefault(name, []).append(values)
            gradients.add(head, part, hidden[part], chunk.uncapped(slopes), -head.steepness * weights * gradient[part])
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*(x for x in (logp, entropy, gradient, divergence) if x is not None))
        joined = {name: torch.cat(values) for name, values in metrics.items()}
        return loss, logp, entropy, gradient, divergence, joined

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope, *_) = grads
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradient is released after one backward pass; call it again")
        # No other reference is left, so the weight's gradient becomes its .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        # The slope is usually 1; skipping the product saves a pass over the weight's gradient.
        return *gradients.results(None if float(slope) == 1 else slope), None, None


def linear_logprob(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
    auxiliary: AuxiliaryOutputs | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `drpo.ops.linear_logprob` does, and the auxiliary outputs [T, n] or None."""
    options = HeadOptions.of(head, temperature, chunk, auxiliary)
    columns: tuple[Tensor, Tensor, Tensor | None]
    columns = _LinearLogprob.apply(hidden, head.weight, head.bias, target, options)  # type: ignore[no-untyped-call]
    return columns


def linear_policy_loss(
    hidden: Tensor,
    head: Head,
    sampled: SampledTokens,
    objective: Objective,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    auxiliary: AuxiliaryOutputs | None = None,
) -> PolicyLoss:
    """Return what `drpo.ops.linear_policy_loss` does, for a token-wise objective and trained tokens alone.

    `auxiliary` computes the divergence [T, 1] where the objective reads one.
    """
    options = HeadOptions.of(head, temperature, chunk, auxiliary)
    columns = _LinearPolicyLoss.apply(hidden, head.weight, head.bias, _Tokenwise(sampled, objective), options)  # type: ignore[no-untyped-call]
    loss, logp, entropy, gradient, divergence, metrics = columns
    return PolicyLoss(loss, logp, entropy, gradient, metrics, divergence)
