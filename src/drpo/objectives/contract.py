"""The objective protocol, and functions of any objective: total loss, gradient, gradient weight, skipping."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from drpo.checks import require_columns
from drpo.errors import InputError
from drpo.objectives.divergence import needed_divergence
from drpo.objectives.ratios import ratio
from drpo.types import TokenLoss, Tokens

CONTRACT = (
    "an objective has `tokenwise` (bool) and `needs` (frozenset), and returns TokenLoss(loss), a loss of shape [T] "
    "that is differentiable in tokens.logp"
)

FACTOR_EXAMPLE = "band(0.5, 5.0)"


@runtime_checkable
class Objective(Protocol):
    """A loss per token. Any callable with these attributes is an objective; no registration is required.

    Attributes:
        tokenwise: False where a token's loss depends on the rest of its sequence (GSPO); all of it then comes in one
            call. For an objective that reads statistics of the batch: once these are given, see `HasBatch`.
        needs: what it reads besides: the divergence, from `divergence.TOPK`, that `Tokens.divergence` must hold;
            "position", the order of a sequence's tokens; "proximal_logp", the policy's own log-probabilities before the
            updates of the rollout; "score", the reward of the token's episode; "reference_logp", a reference model's
            log-probabilities; "batch", statistics of the whole optimiser batch.
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
    """An objective that reports which tokens have left its trust region. Without the method there are no such
    metrics."""

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: True where the policy is beyond the region's border, for any advantage."""
        ...


@runtime_checkable
class HasBatch(Objective, Protocol):
    """An objective that reads statistics of the whole optimiser batch: `needs` has "batch".

    A call takes its tokens for the whole batch. A trainer that splits the batch calls `of_batch` before.
    """

    def of_batch(self, tokens: Tokens) -> Objective:
        """Return the objective with the statistics of these tokens, which is then called on any part of them."""
        ...


def reads_batch(objective: Objective) -> bool:
    """Return whether an objective reads statistics of the whole optimiser batch.

    Example:
        >>> from drpo.objectives import DRPO, M2PO
        >>> reads_batch(M2PO()), reads_batch(DRPO(0.2))
        (True, False)
    """
    return "batch" in objective.needs


def of_batch(objective: Objective, tokens: Tokens) -> Objective:
    """Return the objective with the statistics of an optimiser batch; one that reads none as it is.

    The result may be called on any part of the batch: micro-batches and ranks change nothing.

    Args:
        objective: any objective.
        tokens: all T tokens of the optimiser batch; those not kept count nowhere.

    Raises:
        InputError: `needs` has "batch", but there is no method `of_batch`.

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> of_batch(DRPO(0.2), Tokens(-one, -one, one, one.bool(), one.long())) == DRPO(0.2)
        True
    """
    if not reads_batch(objective):
        return objective
    if not isinstance(objective, HasBatch):
        raise _unfit(objective, "needs the batch, but has no method `of_batch`")
    with torch.no_grad():
        return objective.of_batch(masked_safe(tokens))


def masked_safe(tokens: Tokens) -> Tokens:
    """Return the tokens with 0 in all columns where they are not kept, *before* anything is exponentiated.

    A `where` after the exponential would give a finite loss with a NaN gradient (inf * 0).
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
        position=tokens.position,
        proximal_logp=None if tokens.proximal_logp is None else clean(tokens.proximal_logp),
        score=None if tokens.score is None else clean(tokens.score),
        reference_logp=None if tokens.reference_logp is None else clean(tokens.reference_logp),
    )


def unchecked(**columns: Any) -> Tokens:
    """Return tokens of these columns without checks; the columns come from checked tokens."""
    tokens = object.__new__(Tokens)
    for name, values in columns.items():
        object.__setattr__(tokens, name, values)
    return tokens


def around_proximal(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Return the tokens with the proximal policy in the sampler's place, and with it in the policy's."""
    if tokens.proximal_logp is None:
        raise InputError(
            "tokens.proximal_logp is missing: the objective is held to the policy of before the updates; fill it, or "
            "leave '*proximal' (in vespo: max_ratio) out"
        )
    near = unchecked(**{**vars(tokens), "behavior_logp": tokens.proximal_logp})
    return near, unchecked(**{**vars(tokens), "logp": tokens.proximal_logp})


def require_objective(objective: object) -> None:
    """Raise InputError unless `objective` has an objective's attributes."""
    if isinstance(objective, str):
        built = f"drpo.spec.parse_spec({objective!r}, drpo.objectives.REGISTRY)"
        raise InputError(f"objective={objective!r} is text: build it with {built}")
    if isinstance(objective, type):
        raise InputError(f"objective {objective.__name__} is a class: pass an instance, {objective.__name__}(...)")
    if hasattr(objective, "factor"):
        raise InputError(f"objective {objective!r} is a factor: write it behind an objective, 'none*{FACTOR_EXAMPLE}'")
    missing = [name for name in ("tokenwise", "needs", "__call__") if not hasattr(objective, name)]
    if missing:
        raise _unfit(objective, f"has no `{missing[0]}`")


def require_tokens(tokens: object) -> None:
    """Raise InputError unless `tokens` is a `Tokens`."""
    if not isinstance(tokens, Tokens):
        raise InputError(f"tokens: must be drpo.objectives.Tokens(...), not {type(tokens).__name__}")


def _unfit(objective: object, what: str) -> InputError:
    return InputError(f"objective {type(objective).__name__} {what}; {CONTRACT}")


def ask(objective: Objective, tokens: Tokens) -> TokenLoss:
    """Return the objective's loss per token, independent of the values of tokens that are not kept.

    Raises:
        InputError: `objective` is no objective, returns no loss per token, or returns a loss without a gradient.
    """
    require_objective(objective)
    result = objective(masked_safe(tokens))
    if not isinstance(result, TokenLoss) or not isinstance(result.loss, Tensor):
        raise _unfit(objective, f"returned {type(result).__name__}")
    shape = tokens.logp.shape
    if result.loss.shape != shape:
        raise _unfit(objective, f"returned a loss of shape {list(result.loss.shape)} for tokens {list(shape)}")
    if tokens.logp.requires_grad and torch.is_grad_enabled() and not result.loss.requires_grad:
        raise _unfit(objective, "returned a loss without a gradient (detached, or not made of tokens.logp)")
    return result


def total(objective: Objective, tokens: Tokens, weight: Tensor) -> Tensor:
    """Return the loss of a batch or of a part of it: the sum over kept tokens of weight * loss.

    The weights are fixed over the whole optimiser batch (`drpo.reductions`), so the parts of any split add up to the
    same loss and gradient, and masking a token equals removing it, bit for bit.

    Args:
        objective: any objective.
        tokens: T tokens; `logp` carries the gradient.
        weight: [T] float, finite and >= 0; factor of each token's loss.

    Returns:
        A scalar, differentiable in `tokens.logp`; exactly 0, and still differentiable, where nothing is kept.

    Raises:
        InputError: a weight that does not fit (values are checked on the CPU alone), or no objective.

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
    """Return the objective's loss per token, detached, and `gradient(objective, tokens)`, from one evaluation.

    Args:
        objective: any objective.
        tokens: T tokens, of any floating dtype.

    Returns:
        TokenLoss with loss [T] (meaningless where a token is not kept), and the gradient [T].

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> result, slope = value_and_gradient(DRPO(0.2), Tokens(-one, -one, one, one.bool(), one.long()))
        >>> result.loss, slope
        (tensor([-1.]), tensor([-1.]))
    """
    require_tokens(tokens)
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() is on, which allows no gradients: use torch.no_grad() instead")
    columns = {name: v.clone() if v is not None and v.is_inference() else v for name, v in vars(tokens).items()}
    with torch.enable_grad():
        logp = columns["logp"].detach().requires_grad_()
        leaf = unchecked(**columns | {"logp": logp})
        result = ask(objective, leaf)
        return TokenLoss(result.loss.detach(), result.metrics), gradient_of(objective, result, leaf)


def gradient_of(objective: Objective, result: TokenLoss, tokens: Tokens) -> Tensor:
    """Return d(sum of the kept tokens' losses) / d logp, [T], given the objective's `result` for `tokens`.

    The loss's graph is retained, so the loss can still be differentiated.

    Raises:
        InputError: the loss has no gradient.
    """
    if not tokens.logp.requires_grad:  # nothing upstream is trained
        return gradient(objective, tokens)
    kept = result.loss[tokens.keep].sum()
    (slope,) = torch.autograd.grad(kept, tokens.logp, retain_graph=True, allow_unused=True)
    if slope is None:
        raise _unfit(objective, "returned a loss without a gradient (detached, or not made of tokens.logp)")
    return slope


def gradient_weight(objective: Objective, tokens: Tokens) -> Tensor:
    """Return the factor w of an objective's gradient relative to the plain policy gradient, per token.

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
    """Return `gradient_weight`, given the objective's `gradient` [T] at these tokens."""
    safe = masked_safe(tokens)
    plain = (-safe.advantage * ratio(safe)).detach()
    defined = tokens.keep & (plain != 0)
    return torch.where(defined, gradient / torch.where(defined, plain, 1), 1)


def vanishes_at_zero_advantage(objective: Objective) -> bool:
    """Return whether a token with A = 0 has no gradient, so that the trainer may skip it.

    No probe can prove this for every token, so the objective declares it: `vanishes_at_zero_advantage = True`. Without
    the attribute no token is skipped, which only costs time.

    Raises:
        InputError: the objective declares it, and a probe finds a gradient at A = 0.

    Example:
        >>> from drpo.objectives import DRPO
        >>> vanishes_at_zero_advantage(DRPO(0.2)), vanishes_at_zero_advantage(DRPO(0.2, advantage_weighted=False))
        (True, False)
    """
    require_objective(objective)
    if not getattr(objective, "vanishes_at_zero_advantage", False):
        return False
    probe = _without_advantage(needed_divergence(objective.needs) is not None)
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
    """Return tokens with A = 0 and probabilities from 1 to 0, in sequences of 1 token and of hundreds."""
    grid = torch.tensor([0.0, -1e-6, -1e-3, -0.01, -0.1, -0.3, -0.7, -1.2, -2, -3, -5, -8, -12, -20, -40, -90, -1000])
    logp, behavior_logp = (g.reshape(-1).repeat(4) for g in torch.meshgrid(grid, grid, indexing="ij"))
    n = len(logp)
    each = torch.arange(n)
    divergence = torch.tensor([0.0, 1e-4, 0.01, 0.1, 0.3, 1.0, 3.0, 1e3])[each % 8] if with_divergence else None
    keep = torch.ones(n, dtype=torch.bool)
    sequence = torch.where(each < n // 2, each, n)
    more = {"proximal_logp": behavior_logp.roll(7), "score": each % 3 - 1.0, "reference_logp": logp.roll(5)}
    return Tokens(logp, behavior_logp, torch.zeros(n), keep, sequence, divergence, **more)
