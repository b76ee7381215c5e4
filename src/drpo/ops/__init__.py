"""The head operator: hidden states -> log-probabilities, without ever holding the logits of all tokens."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from drpo.checks import require_columns, slack
from drpo.errors import InputError
from drpo.objectives.contract import Objective, ask, require_objective
from drpo.objectives.divergence import TOPK, needed_divergence
from drpo.ops import chunked
from drpo.types import Tokens, TopK


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability under softmax(hidden weight^T / temperature), and the softmax's entropy.

        logp_t = z_t[y_t] - logsumexp(z_t),   H_t = -sum_v p_t[v] log p_t[v],   z_t = weight hidden_t / temperature

    Both outputs are differentiable in `hidden` and `weight`, and both gradients are exact. Matrix products run in
    `hidden`'s dtype, everything else in float32, and the weight's gradient is accumulated in float32. A weight tied to
    the embedding is fine: autograd adds the two gradients. Memory beyond inputs and gradients: [chunk, V], a few times.

    Args:
        hidden: [T, H] float; the states that predict the targets.
        weight: [V, H] float; the output embedding; may have another dtype than `hidden` (float32 master weights).
        target: [T] int64 in [0, V).
        temperature: > 0.
        chunk: tokens per chunk; None chooses by memory. The result does not depend on it but for rounding.

    Returns:
        logp [T] and entropy [T], nats, float32 (float64 for float64 inputs).

    Raises:
        InputError: shapes that do not fit, or a temperature or chunk that is not positive.

    Example:
        >>> import torch
        >>> logp, entropy = linear_logprob(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]))
        >>> logp.exp(), entropy.exp()
        (tensor([0.2500]), tensor([4.]))
    """
    _require_head("linear_logprob", hidden, weight, target, temperature, chunk)
    _require_ids("linear_logprob", len(weight), target)
    logp, entropy, _ = chunked.linear_logprob(hidden, weight, target, temperature, chunk=chunk)
    return logp, entropy


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    top: TopK,
    kinds: Iterable[str] = tuple(TOPK),
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Return what `linear_logprob` does, and from the same logits how far the policy is from the sampler.

    With K = V these are the exact total variation and KL of the whole laws. Memory beyond inputs and gradients: a few
    times [chunk, V], whatever K.

    Args:
        hidden, weight, target, temperature, chunk: as for `linear_logprob`.
        top: K of the sampler's likeliest tokens at each of the T.
        kinds: of `drpo.objectives.TOPK`: "topk_tv", "topk_kl".

    Returns:
        logp [T] and entropy [T] with their gradients; and each kind's divergence [T], detached, float32 or wider.

    Raises:
        InputError: shapes that do not fit, a temperature or chunk that is not positive, or an unknown kind or none.

    Example:
        >>> from drpo.types import TopK
        >>> top = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log())
        >>> _, _, moved = linear_divergence(torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]), top)
        >>> moved["topk_tv"]
        tensor([0.2500])
    """
    _require_head("linear_divergence", hidden, weight, target, temperature, chunk)
    _require_top("linear_divergence", target, top)
    _require_ids("linear_divergence", len(weight), target, top)
    names = tuple(kinds)
    if not names:
        raise InputError(f"linear_divergence: kinds is empty; name at least one of {', '.join(TOPK)}")
    for name in names:
        needed_divergence({name})
    aside = chunked.Aside.divergences(top, names)
    logp, entropy, made = chunked.linear_logprob(hidden, weight, target, temperature, chunk=chunk, aside=aside)
    assert made is not None
    return logp, entropy, dict(zip(names, made.unbind(-1), strict=True))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    *,
    behavior_logp: Tensor,
    advantage: Tensor,
    keep: Tensor,
    sequence: Tensor,
    token_weight: Tensor,
    top: TopK | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Return an objective's loss straight from hidden states: `linear_logprob` and `objectives.total` in one.

        loss = sum over kept tokens of token_weight_t * objective(logp_t, ...)

    For a token-wise objective, anyone's, the gradient is made chunk by chunk while the log-probabilities are: each
    logit is computed once, and three matrix products are all there is. Any other objective needs all log-probabilities
    first, so its logits are made again in the backward pass. Tokens that are not kept, or that weigh 0, are never
    multiplied. A divergence that the objective reads is made of the same logits, chunk by chunk.

    Args:
        hidden: [T, H] float; the states that predict the targets.
        weight: [V, H] float; the output embedding; may have another dtype than `hidden`.
        target: [T] int64 in [0, V).
        objective: loss per token.
        behavior_logp: [T] float32, nats, <= 0.
        advantage: [T] float32.
        keep: [T] bool; which tokens are trained.
        sequence: [T] int64; which completion each belongs to.
        token_weight: [T] float32; what each token's loss counts, fixed over the whole optimiser batch.
        top: the sampler's likeliest tokens at each of the T, for objectives whose `needs` names a divergence.
        temperature: > 0.
        chunk: tokens per chunk; None chooses by memory. The result does not depend on it but for rounding.

    Returns:
        loss, a scalar, differentiable in `hidden` and `weight` (once); logp [T], detached, nats, 0 where a token is
        left out; and name -> [n], of the n tokens that are not: the objective's metrics, the policy's "entropy", and
        the "divergence" where the objective reads one.

    Raises:
        InputError: shapes that do not fit, a temperature or chunk that is not positive, or no `top` where it is needed.

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> loss, logp, metrics = linear_policy_loss(
        ...     torch.zeros(1, 3), torch.ones(4, 3), torch.tensor([2]), DRPO(0.2), behavior_logp=one.mul(0.25).log(),
        ...     advantage=one, keep=one.bool(), sequence=one.long(), token_weight=one)
        >>> loss, logp.exp(), metrics["entropy"].exp()
        (tensor(-1.), tensor([0.2500]), tensor([4.]))
    """
    require_objective(objective)
    _require_head("linear_policy_loss", hidden, weight, target, temperature, chunk)
    columns = dict(behavior_logp=behavior_logp, advantage=advantage, sequence=sequence, token_weight=token_weight)
    require_columns("linear_policy_loss: ", {"keep": keep, "token_weight": token_weight}, ("target", target), keep)
    trained = keep & (token_weight != 0)
    require_columns("linear_policy_loss: ", columns, ("target", target), trained)
    top = _needed_top(objective, target, top)
    everything = bool(trained.all())
    if not everything:
        hidden, target, top = hidden[trained], target[trained], None if top is None else top.at(trained)
        columns = {name: column[trained] for name, column in columns.items()}
    _require_ids("linear_policy_loss", len(weight), target, top)
    aside = None if top is None else chunked.Aside.divergences(top, tuple(objective.needs))
    if objective.tokenwise:
        loss, found, metrics = chunked.linear_policy_loss(
            hidden, weight, target, objective, **columns, temperature=temperature, chunk=chunk, aside=aside
        )
    else:
        logp, entropy, made = chunked.linear_logprob(hidden, weight, target, temperature, chunk=chunk, aside=aside)
        loss, found, metrics = _loss_of_all(logp, entropy, made, objective, **columns)
    return loss, found if everything else found.new_zeros(trained.shape).masked_scatter(trained, found), metrics


def _loss_of_all(
    logp: Tensor,
    entropy: Tensor,
    made: Tensor | None,
    objective: Objective,
    *,
    behavior_logp: Tensor,
    advantage: Tensor,
    sequence: Tensor,
    token_weight: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same from log-probabilities that are all there, with autograd going back through them."""
    divergence = None if made is None else made[:, 0]
    keep = torch.ones_like(sequence, dtype=torch.bool)
    seen = ask(objective, Tokens(logp, behavior_logp, advantage, keep, sequence, divergence))
    metrics = {**seen.metrics, "entropy": entropy.detach()} | ({} if divergence is None else {"divergence": divergence})
    return (token_weight * seen.loss).sum(), logp.detach(), metrics


def _needed_top(objective: Objective, target: Tensor, top: TopK | None) -> TopK | None:
    """`top` where the objective reads a divergence, else None."""
    kind = needed_divergence(objective.needs)
    if kind is None:
        return None
    if top is None:
        raise InputError(
            f"linear_policy_loss: the objective needs {kind!r}, but top is missing; sample with "
            "sampling.top_logprobs > 0, from an engine that reports them"
        )
    _require_top("linear_policy_loss", target, top)
    return top


def _require_top(who: str, target: Tensor, top: Any) -> None:
    if not isinstance(top, TopK):
        raise InputError(f"{who}: top: must be a drpo.types.TopK, not {type(top).__name__}")
    shape = top.ids.shape
    if len(shape) != 2 or shape[:1] != target.shape or shape[1] < 1 or top.logp.shape != shape:
        raise InputError(
            f"{who}: top.ids {list(shape)}, top.logp {list(top.logp.shape)}, target {list(target.shape)} "
            "do not fit [T, K], [T, K], [T]"
        )


def _require_ids(who: str, size: int, target: Tensor, top: TopK | None = None) -> None:
    """Raise for token ids that the vocabulary has not, and for a `top` out of order; values on the CPU alone."""
    for name, ids in (("target", target), *(() if top is None else (("top.ids", top.ids),))):
        if ids.dtype not in (torch.int64, torch.int32):
            swapped = "; are ids and logp swapped?" if name == "top.ids" and ids.is_floating_point() else ""
            raise InputError(f"{who}: {name} {ids.dtype}: must be int64, ids of tokens{swapped}")
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            ignored = "; leave tokens with the label -100 out, or set their keep to False" if wrong == -100 else ""
            raise InputError(f"{who}: {name} has {wrong}: must be in [0, {size}), the rows of weight{ignored}")
    if top is not None and top.logp.device.type == "cpu":
        if not top.logp.is_floating_point() or not bool(top.logp.max() <= slack(top.logp.dtype)):
            raise InputError(f"{who}: top.logp: must be log-probabilities, float and at most 0")
        few = max(1, 4096 // top.logp.shape[1])  # rows at a time: nothing of the size of the logits is made
        parts = (top.logp[i : i + few] for i in range(0, len(top.logp), few))
        if any(bool((rows[:, 1:] > rows[:, :-1] + slack(rows.dtype)).any()) for rows in parts):
            raise InputError(f"{who}: top: must be sorted by falling probability in every row")


def _require_head(who: str, hidden: Any, weight: Any, target: Any, temperature: Any, chunk: Any) -> None:
    for name, values in (("hidden", hidden), ("weight", weight), ("target", target)):
        if not isinstance(values, Tensor):
            raise InputError(f"{who}: {name}: must be a tensor, not {type(values).__name__}")
        if values.device != hidden.device:
            raise InputError(f"{who}: {name} is on {values.device}, hidden on {hidden.device}: move it with .to(...)")
        if name != "target" and not values.is_floating_point():
            raise InputError(f"{who}: {name} {values.dtype}: must be float; write {name}.float()")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise InputError(
            f"{who}: hidden {list(hidden.shape)}, weight {list(weight.shape)}, target {list(target.shape)} "
            "do not fit [T, H], [V, H], [T]"
        )
    one = isinstance(temperature, Real) or (isinstance(temperature, Tensor) and temperature.numel() == 1)
    if not (one and 0 < temperature < math.inf):
        raise InputError(f"temperature={temperature!r}: must be > 0 and finite")
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk={chunk!r}: must be at least 1, a whole number")


__all__ = ["linear_divergence", "linear_logprob", "linear_policy_loss"]
