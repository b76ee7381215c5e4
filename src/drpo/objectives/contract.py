"""What an objective is, and the four questions that can be asked of any one of them."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from drpo.checks import require_columns
from drpo.errors import InputError
from drpo.types import TokenLoss, Tokens

MAX_LOG_RATIO = 20.0
"""Ratios are e^min(logp - behavior_logp, 20); tokens beyond are counted by the trainer as capped."""

LOWEST_LOGP = -1e30
"""Stands for -inf, the logarithm of a probability of 0, so that no difference or product of logarithms is NaN. What is
finite in the limit is that limit: r = 0 where pi = 0, r = e^20 where mu = 0, and r = 1 where both are 0."""

CONTRACT = (
    "an objective has `tokenwise` (bool) and `needs` (frozenset), and returns TokenLoss(loss), a loss of shape [T] "
    "that is differentiable in tokens.logp"
)

SECOND = (
    "drpo: a second derivative of a loss whose gradient is stated in closed form does not exist here; leave out "
    "create_graph=True, or write the objective in plain operations"
)


@runtime_checkable
class Objective(Protocol):
    """A loss per token. Any callable of this shape is one; there is nothing to register.

    Attributes:
        tokenwise: False where a token's loss depends on the rest of its sequence (GSPO).
        needs: the name, from `divergence.TOPK`, of what `Tokens.divergence` must hold; empty where it is not read.
        vanishes_at_zero_advantage: optional bool; True promises that a token with A = 0 has no gradient.
        out_of_region: optional method; see `HasRegion`.
    """

    @property
    def tokenwise(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, tokens: Tokens) -> TokenLoss: ...


@runtime_checkable
class HasRegion(Objective, Protocol):
    """An objective that says which tokens have left its trust region. The method is optional; without it there are no
    such metrics."""

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: True where the policy is beyond the region's border, whatever the advantage."""
        ...


def masked_safe(tokens: Tokens) -> Tokens:
    """Replace what stands in slots that are not kept by harmless numbers, *before* anything is exponentiated.

    A `where` after the exponential would leave a finite loss with a NaN gradient (inf * 0).
    """

    def clean(values: Tensor) -> Tensor:
        return torch.where(tokens.keep, values, torch.zeros_like(values))

    return unchecked(
        logp=clean(tokens.logp),
        behavior_logp=clean(tokens.behavior_logp),
        advantage=clean(tokens.advantage),
        keep=tokens.keep,
        sequence=tokens.sequence,
        divergence=None if tokens.divergence is None else clean(tokens.divergence),
    )


def unchecked(**columns: Any) -> Tokens:
    """Return tokens of these columns without checking them: they come from tokens that were checked."""
    tokens = object.__new__(Tokens)
    for name, values in columns.items():
        object.__setattr__(tokens, name, values)
    return tokens


def require_objective(objective: object) -> None:
    """Raise InputError unless `objective` is made as an objective is."""
    if isinstance(objective, str):
        built = f"drpo.spec.parse_spec({objective!r}, drpo.objectives.REGISTRY)"
        raise InputError(f"objective={objective!r} is text: build it with {built}")
    if isinstance(objective, type):
        raise InputError(f"objective {objective.__name__} is a class: pass an instance, {objective.__name__}(...)")
    missing = [name for name in ("tokenwise", "needs", "__call__") if not hasattr(objective, name)]
    if missing:
        raise _unfit(objective, f"has no `{missing[0]}`")


def require_tokens(tokens: object) -> None:
    """Raise InputError unless `tokens` are the record that every objective reads."""
    if not isinstance(tokens, Tokens):
        raise InputError(f"tokens: must be drpo.objectives.Tokens(...), not {type(tokens).__name__}")


def _unfit(objective: object, what: str) -> InputError:
    return InputError(f"objective {type(objective).__name__} {what}; {CONTRACT}")


def ask(objective: Objective, tokens: Tokens) -> TokenLoss:
    """Return what the objective says of each token, whatever the slots hold that are not kept.

    Raises:
        InputError: no objective, or one that returns no loss per token, or one without a gradient.
    """
    require_objective(objective)
    seen = objective(masked_safe(tokens))
    if not isinstance(seen, TokenLoss) or not isinstance(seen.loss, Tensor):
        raise _unfit(objective, f"returned {type(seen).__name__}")
    shape = tokens.logp.shape
    if seen.loss.shape != shape:
        raise _unfit(objective, f"returned a loss of shape {list(seen.loss.shape)} for tokens {list(shape)}")
    if tokens.logp.requires_grad and torch.is_grad_enabled() and not seen.loss.requires_grad:
        raise _unfit(objective, "returned a loss without a gradient (detached, or not made of tokens.logp)")
    return seen


def total(objective: Objective, tokens: Tokens, weight: Tensor) -> Tensor:
    """Return the batch's loss, or a part's share of it: sum over kept tokens of weight * loss.

    The weights are fixed over the whole optimiser batch (`drpo.reductions`), so the shares of any split add up to the
    same loss and the same gradient, and a masked token is a removed token, to the bit.

    Args:
        objective: any objective.
        tokens: T tokens; `logp` carries the gradient.
        weight: [T] float, finite and >= 0; what each token counts.

    Returns:
        A scalar, differentiable in `tokens.logp`; exactly 0, and still differentiable, where nothing is kept.

    Raises:
        InputError: a weight that does not fit (its values are looked at on the CPU alone), or no objective.

    Example:
        >>> from drpo.objectives import DRPO
        >>> keep, sequence = torch.tensor([True, False]), torch.tensor([0, 0])
        >>> t = Tokens(torch.zeros(2), torch.zeros(2), torch.ones(2), keep, sequence)
        >>> total(DRPO(0.2), t, torch.ones(2))
        tensor(-1.)
    """
    require_tokens(tokens)
    require_columns("", {"weight": weight}, ("tokens.logp", tokens.logp), tokens.keep)
    loss = ask(objective, tokens).loss
    return (weight * loss)[tokens.keep].sum()


def gradient(objective: Objective, tokens: Tokens) -> Tensor:
    """Return d(sum of the kept tokens' losses) / d logp.

    Args:
        objective: any objective.
        tokens: T tokens, of any floating dtype.

    Returns:
        [T], detached, in the dtype of `tokens.logp`; 0 where a token is not kept.

    Raises:
        InputError: inside `torch.inference_mode()`, where there are no gradients (`torch.no_grad()` is fine).

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> gradient(DRPO(0.2), Tokens(-one, -one, one, one.bool(), one.long()))  # on-policy: REINFORCE
        tensor([-1.])
    """
    return value_and_gradient(objective, tokens)[1]


def value_and_gradient(objective: Objective, tokens: Tokens) -> tuple[TokenLoss, Tensor]:
    """Return what the objective says of each token, detached, and `gradient(objective, tokens)`, asking it once.

    Args:
        objective: any objective.
        tokens: T tokens, of any floating dtype.

    Returns:
        TokenLoss with loss [T] (meaningless where a token is not kept), and the gradient [T].

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> seen, slope = value_and_gradient(DRPO(0.2), Tokens(-one, -one, one, one.bool(), one.long()))
        >>> seen.loss, slope
        (tensor([-1.]), tensor([-1.]))
    """
    require_tokens(tokens)
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() is on, in which nothing has a gradient: use torch.no_grad() instead")
    columns = {name: v.clone() if v is not None and v.is_inference() else v for name, v in vars(tokens).items()}
    with torch.enable_grad():
        logp = columns["logp"].detach().requires_grad_()
        here = unchecked(**columns | {"logp": logp})
        seen = ask(objective, here)
        return TokenLoss(seen.loss.detach(), seen.metrics), gradient_of(objective, seen, here)


def gradient_of(objective: Objective, seen: TokenLoss, tokens: Tokens) -> Tensor:
    """Return d(sum of the kept tokens' losses) / d logp, [T], of a loss `seen` that the objective gave for `tokens`.

    The graph of the loss is kept, so that it can still be differentiated itself.

    Raises:
        InputError: the loss has no gradient.
    """
    if not tokens.logp.requires_grad:  # nothing upstream is trained
        return gradient(objective, tokens)
    kept = seen.loss[tokens.keep].sum()
    (slope,) = torch.autograd.grad(kept, tokens.logp, retain_graph=True, allow_unused=True)
    if slope is None:
        raise _unfit(objective, "returned a loss without a gradient (detached, or not made of tokens.logp)")
    return slope


def gradient_weight(objective: Objective, tokens: Tokens) -> Tensor:
    """Return the factor w by which an objective changes the plain policy gradient of each token.

        d loss / d logp = -A * r * w,   r = pi / mu

    Args:
        objective: any objective.
        tokens: T tokens.

    Returns:
        [T], detached; 1 where A is 0 or the token is not kept (and where r underflows to 0: w is undefined there).

    Example:
        >>> from drpo.objectives import DRPO
        >>> pi, mu, yes = torch.tensor([0.5]), torch.tensor([0.4]), torch.tensor([True])
        >>> gradient_weight(DRPO(0.2), Tokens(pi.log(), mu.log(), torch.ones(1), yes, torch.zeros(1).long()))
        tensor([0.5000])

    Source: DRPO, arXiv 2606.09821, Table 1.
    """
    require_tokens(tokens)
    return weight_of_gradient(tokens, gradient(objective, tokens))


def weight_of_gradient(tokens: Tokens, gradient: Tensor) -> Tensor:
    """Return `gradient_weight` of an objective whose `gradient` [T] at these tokens is known already."""
    safe = masked_safe(tokens)
    plain = (-safe.advantage * ratio(safe)).detach()
    defined = tokens.keep & (plain != 0)
    return torch.where(defined, gradient / torch.where(defined, plain, 1), 1)


def vanishes_at_zero_advantage(objective: Objective) -> bool:
    """True where a token with A = 0 has no gradient, so that the trainer may skip it without changing anything.

    No probe can prove that of every token, so the objective says it: an attribute `vanishes_at_zero_advantage`, True.
    One that says nothing is never skipped, which costs time and nothing else. A promise that a probe finds broken is an
    error.

    Raises:
        InputError: the objective promises it, and has such a gradient.

    Example:
        >>> from drpo.objectives import DRPO
        >>> vanishes_at_zero_advantage(DRPO(0.2)), vanishes_at_zero_advantage(DRPO(0.2, advantage_weighted=False))
        (True, False)
    """
    require_objective(objective)
    if not getattr(objective, "vanishes_at_zero_advantage", False):
        return False
    probe = _without_advantage(bool(objective.needs))
    moving = gradient(objective, probe).nonzero()
    if len(moving):
        at = int(moving[0])
        raise _unfit(
            objective,
            "promises vanishes_at_zero_advantage=True, but has a gradient at advantage 0, "
            f"logp {float(probe.logp[at]):g}, behavior_logp {float(probe.behavior_logp[at]):g}",
        )
    return True


def _without_advantage(with_divergence: bool) -> Tokens:
    """Tokens with A = 0, from the most probable to the impossible, in sequences of 1 token and of hundreds."""
    grid = torch.tensor([0.0, -1e-6, -1e-3, -0.01, -0.1, -0.3, -0.7, -1.2, -2, -3, -5, -8, -12, -20, -40, -90, -1000])
    logp, behavior_logp = (g.reshape(-1).repeat(4) for g in torch.meshgrid(grid, grid, indexing="ij"))
    n = len(logp)
    each = torch.arange(n)
    moved = torch.tensor([0.0, 1e-4, 0.01, 0.1, 0.3, 1.0, 3.0, 1e3])[each % 8] if with_divergence else None
    keep = torch.ones(n, dtype=torch.bool)
    return Tokens(logp, behavior_logp, torch.zeros(n), keep, torch.where(each < n // 2, each, n), moved)


# What objectives are made of. Probabilities, ratios and shifts are computed in float32 or wider, whatever comes in.


def wide(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """`logp`, `behavior_logp`, `advantage`, each in float32, or float64 where it came so; -inf as `LOWEST_LOGP`."""

    def widen(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else values.float()

    logp, behavior_logp = (widen(x).clamp(min=LOWEST_LOGP) for x in (tokens.logp, tokens.behavior_logp))
    return logp, behavior_logp, widen(tokens.advantage)


def log_ratio(tokens: Tokens) -> Tensor:
    """Return logp - behavior_logp, [T], finite: 0 where both probabilities are 0, beyond +-1e29 where one is."""
    logp, behavior_logp, _ = wide(tokens)
    return logp - behavior_logp


def ratio(tokens: Tokens) -> Tensor:
    """Return r = pi / mu = e^min(logp - behavior_logp, 20), [T]; never infinite."""
    return torch.exp(log_ratio(tokens).clamp(max=MAX_LOG_RATIO))


def prob_diff(tokens: Tokens, power: float = 0.0) -> Tensor:
    """Return D / mu^power, D = pi - mu, [T], without cancellation where pi is near mu and without overflow anywhere.

        D / mu^q = sign(l - m) * e^(max(l, m) - q m) * (1 - e^-|l - m|)

    At q = 0 it is exact and in [-1, 1]; at q = 1 it is r - 1. The exponent is capped at 20, as the ratio's is.
    """
    logp, behavior_logp, _ = wide(tokens)
    moved = logp - behavior_logp
    scale = torch.exp((torch.maximum(logp, behavior_logp) - power * behavior_logp).clamp(max=MAX_LOG_RATIO))
    return -moved.sign() * scale * torch.expm1(-moved.abs())


def token_loss(tokens: Tokens, value: Tensor, slope: Tensor) -> TokenLoss:
    """Return the loss with this value and this derivative with respect to `tokens.logp`, both [T] constants.

    Objectives state their derivative in closed form because that is what they are known by; it also keeps it exact
    where the value's own automatic derivative would be inf * 0 (capped ratios, vanishing probabilities). A derivative
    of the derivative is refused.
    """
    loss: Tensor = _ClosedForm.apply(tokens.logp, value.detach(), slope.detach())  # type: ignore[no-untyped-call]
    return TokenLoss(loss)


class _ClosedForm(torch.autograd.Function):
    """(logp, value, slope) [T] -> value, with d value / d logp = slope, also where logp is -inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        logp, _, slope = inputs
        ctx.save_for_backward(logp, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logp, slope = ctx.saved_tensors
        return differentiated((grads[0] * slope).to(logp.dtype), logp), None, None


def differentiated(gradient: Tensor, source: Tensor) -> Tensor:
    """Return a gradient of `source` that says so where it is itself to be differentiated."""
    found: Tensor = _NoSecond.apply(gradient, source)  # type: ignore[no-untyped-call]
    return found


class _NoSecond(torch.autograd.Function):
    """A gradient, as a function of what it is the gradient in: one whose own derivative raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, source: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(SECOND)
