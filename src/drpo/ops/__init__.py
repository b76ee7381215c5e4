"""The head operator: hidden states -> log-probabilities. The logits of all tokens are never held at once."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from drpo.checks import slack
from drpo.errors import InputError
from drpo.objectives.contract import Objective, ask, gradient_of, of_batch, reads_batch, require_objective
from drpo.objectives.divergence import TOPK, needed_divergence
from drpo.ops import chunked
from drpo.ops.chunk_logits import AuxiliaryOutputs
from drpo.ops.head import Head
from drpo.ops.records import PolicyLoss, SampledTokens, require_top_logprobs
from drpo.types import TopK


def linear_logprob(
    hidden: Tensor, head: Head, target: Tensor, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability under softmax(logits / temperature), and the softmax's entropy.

        logp_t = z_t[y_t] - logsumexp(z_t),   H_t = -sum_v p_t[v] log p_t[v],   z = head.logits(hidden) / temperature

    Both outputs are differentiable in `hidden`, the head's weight and its bias; all gradients are exact. Matrix
    products run in `hidden`'s dtype and everything else in float32. The head's gradients are accumulated in float32.
    The weight may be tied to the embedding: autograd adds the two gradients. Memory beyond inputs and gradients: a few
    times [chunk, V].

    Args:
        hidden: [T, H] float; the states that predict the targets.
        head: weight [V, H], and bias, scale and soft cap where the model has them.
        target: [T] int64 in [0, V).
        temperature: > 0.
        chunk: tokens per chunk; None chooses by memory. Changes the result by rounding alone.

    Returns:
        logp [T] and entropy [T], nats, float32 (float64 for float64 inputs).

    Raises:
        InputError: shapes that do not fit, or a temperature or chunk that is not positive.

    Example:
        >>> import torch
        >>> logp, entropy = linear_logprob(torch.zeros(1, 3), Head(torch.ones(4, 3)), torch.tensor([2]))
        >>> logp.exp(), entropy.exp()
        (tensor([0.2500]), tensor([4.]))
    """
    _require_inputs("linear_logprob", hidden, head, target, temperature, chunk)
    _require_ids("linear_logprob", len(head.weight), target)
    logp, entropy, _ = chunked.linear_logprob(hidden, head, target, temperature, chunk=chunk)
    return logp, entropy


def linear_divergence(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    top_logprobs: TopK,
    kinds: Iterable[str] = tuple(TOPK),
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
    """Return what `linear_logprob` does, and the policy's top-K divergences from the sampler, from the same logits.

    With K = V these are the exact total variation and KL of the whole distributions. Memory beyond inputs and
    gradients: a few times [chunk, V], for any K.

    Args:
        hidden, head, target, temperature, chunk: as for `linear_logprob`.
        top_logprobs: the sampler's K most probable tokens at each of the T.
        kinds: names from `drpo.objectives.TOPK`: "topk_tv", "topk_kl".

    Returns:
        logp [T] and entropy [T] with their gradients; and each kind's divergence [T], detached, float32 or wider.

    Raises:
        InputError: shapes that do not fit, a temperature or chunk that is not positive, or an unknown kind or none.

    Example:
        >>> from drpo.types import TopK
        >>> top = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log())
        >>> _, _, divergences = linear_divergence(torch.zeros(1, 3), Head(torch.ones(4, 3)), torch.tensor([2]), top)
        >>> divergences["topk_tv"]
        tensor([0.2500])
    """
    _require_inputs("linear_divergence", hidden, head, target, temperature, chunk)
    require_top_logprobs("linear_divergence: ", target, top_logprobs)
    _require_ids("linear_divergence", len(head.weight), target, top_logprobs)
    names = tuple(kinds)
    if not names:
        raise InputError(f"linear_divergence: kinds is empty; name at least one of {', '.join(TOPK)}")
    for name in names:
        needed_divergence({name})
    auxiliary = AuxiliaryOutputs.divergences(top_logprobs, names)
    logp, entropy, columns = chunked.linear_logprob(hidden, head, target, temperature, chunk=chunk, auxiliary=auxiliary)
    assert columns is not None
    return logp, entropy, dict(zip(names, columns.unbind(-1), strict=True))


def linear_policy_loss(
    hidden: Tensor,
    head: Head,
    tokens: SampledTokens,
    objective: Objective,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> PolicyLoss:
    """Return an objective's loss from hidden states: `linear_logprob` and `objectives.total` fused.

        loss = sum over kept tokens of weight_t * objective(logp_t, ...)

    For any token-wise objective, each chunk's gradient is computed together with its log-probabilities: each logit is
    computed once, in three matrix products per chunk. Any other objective needs all log-probabilities first, so its
    logits are computed again in the backward pass. So are those of an objective that reads statistics of the batch:
    it takes the T tokens for the batch, unless it got them before (`objectives.of_batch`). Tokens that are not kept, or
    whose weight is 0, cost no product. A divergence that the objective reads comes from the same logits. The objective
    is evaluated once; its gradient per token and its metrics are returned.

    Args:
        hidden: [T, H] float; the states that predict the targets.
        head: weight [V, H], and bias, scale and soft cap where the model has them.
        tokens: T sampled tokens.
        objective: loss per token.
        temperature: > 0.
        chunk: tokens per chunk; None chooses by memory. Changes the result by rounding alone.

    Returns:
        The loss, and columns [T]: 0 at tokens that are not kept or whose weight is 0.

    Raises:
        InputError: shapes that do not fit, a temperature or chunk that is not positive, or `top_logprobs` missing where
            the objective needs it.

    Example:
        >>> from drpo.objectives import DRPO
        >>> one = torch.ones(1)
        >>> tokens = SampledTokens(
        ...     torch.tensor([2]), behavior_logp=one.mul(0.25).log(), advantage=one, keep=one.bool(),
        ...     sequence=one.long(), weight=one)
        >>> loss = linear_policy_loss(torch.zeros(1, 3), Head(torch.ones(4, 3)), tokens, DRPO(0.2))
        >>> loss.loss, loss.logp.exp(), loss.entropy.exp(), loss.gradient
        (tensor(-1.), tensor([0.2500]), tensor([4.]), tensor([-1.]))
    """
    require_objective(objective)
    if not isinstance(tokens, SampledTokens):
        raise InputError(f"linear_policy_loss: tokens: must be a drpo.ops.SampledTokens, not {type(tokens).__name__}")
    _require_inputs("linear_policy_loss", hidden, head, tokens.target, temperature, chunk)
    kind = needed_divergence(objective.needs)
    if kind is not None and tokens.top_logprobs is None:
        raise InputError(
            f"linear_policy_loss: the objective needs {kind!r}, but tokens.top_logprobs is missing; sample with "
            "sampling.top_logprobs > 0, from an engine that reports them"
        )
    trained = tokens.trained
    all_trained = bool(trained.all())
    if not all_trained:
        hidden, tokens = hidden[trained], tokens.at(trained)
    top = None if kind is None else tokens.top_logprobs
    _require_ids("linear_policy_loss", len(head.weight), tokens.target, top)
    auxiliary = None if top is None or kind is None else AuxiliaryOutputs.divergences(top, (kind,))
    if reads_batch(objective):
        with torch.no_grad():
            logp, _, _ = chunked.linear_logprob(hidden, head, tokens.target, temperature, chunk=chunk)
        objective = of_batch(objective, tokens.tokens(logp))
    loss_of = chunked.linear_policy_loss if objective.tokenwise else _loss_of_all
    loss = loss_of(hidden, head, tokens, objective, temperature=temperature, chunk=chunk, auxiliary=auxiliary)
    return loss if all_trained else loss.spread(trained)


def _loss_of_all(
    hidden: Tensor,
    head: Head,
    sampled: SampledTokens,
    objective: Objective,
    *,
    temperature: float,
    chunk: int | None,
    auxiliary: AuxiliaryOutputs | None,
) -> PolicyLoss:
    """Return the loss of an objective that reads all log-probabilities at once; autograd differentiates them."""
    logp, entropy, columns = chunked.linear_logprob(
        hidden, head, sampled.target, temperature, chunk=chunk, auxiliary=auxiliary
    )
    divergence = None if columns is None else columns[:, 0]
    tokens = sampled.tokens(logp, divergence)
    token_loss = ask(objective, tokens)
    gradient = gradient_of(objective, token_loss, tokens)
    loss = (sampled.weight * token_loss.loss).sum()
    return PolicyLoss(loss, logp.detach(), entropy.detach(), gradient, token_loss.metrics, divergence)


def _require_ids(who: str, size: int, target: Tensor, top: TopK | None = None) -> None:
    """Raise for ids outside the vocabulary and for unsorted `top_logprobs`; values are read on the CPU alone."""
    for name, ids in (("target", target), *(() if top is None else (("top_logprobs.ids", top.ids),))):
        if ids.dtype not in (torch.int64, torch.int32):
            swapped = "; are ids and logp swapped?" if name == "top_logprobs.ids" and ids.is_floating_point() else ""
            raise InputError(f"{who}: {name} {ids.dtype}: must be int64, ids of tokens{swapped}")
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            ignored = "; leave tokens with the label -100 out, or set their keep to False" if wrong == -100 else ""
            raise InputError(f"{who}: {name} has {wrong}: must be in [0, {size}), the rows of head.weight{ignored}")
    if top is not None and top.logp.device.type == "cpu":
        if not top.logp.is_floating_point() or not bool(top.logp.max() <= slack(top.logp.dtype)):
            raise InputError(f"{who}: top_logprobs.logp: must be log-probabilities, float and at most 0")
        few = max(1, 4096 // top.logp.shape[1])  # rows at a time, so that no temporary is as large as the logits
        parts = (top.logp[i : i + few] for i in range(0, len(top.logp), few))
        if any(bool((rows[:, 1:] > rows[:, :-1] + slack(rows.dtype)).any()) for rows in parts):
            raise InputError(f"{who}: top_logprobs: must be sorted by falling probability in every row")


def _require_inputs(who: str, hidden: Any, head: Any, target: Any, temperature: Any, chunk: Any) -> None:
    if not isinstance(head, Head):
        raise InputError(f"{who}: head: must be a drpo.ops.Head(weight), not {type(head).__name__}")
    for name, values in (("hidden", hidden), ("target", target)):
        if not isinstance(values, Tensor):
            raise InputError(f"{who}: {name}: must be a tensor, not {type(values).__name__}")
    for name, values in (("target", target), ("head.weight", head.weight)):
        if values.device != hidden.device:
            raise InputError(f"{who}: {name} is on {values.device}, hidden on {hidden.device}: move it with .to(...)")
    if not hidden.is_floating_point():
        raise InputError(f"{who}: hidden {hidden.dtype}: must be float; write hidden.float()")
    weight = head.weight
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise InputError(
            f"{who}: hidden {list(hidden.shape)}, head.weight {list(weight.shape)}, target {list(target.shape)} "
            "do not fit [T, H], [V, H], [T]"
        )
    one = isinstance(temperature, Real) or (isinstance(temperature, Tensor) and temperature.numel() == 1)
    if not (one and 0 < temperature < math.inf):
        raise InputError(f"temperature={temperature!r}: must be > 0 and finite")
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise InputError(f"chunk={chunk!r}: must be at least 1, a whole number")


__all__ = [
    "Head",
    "PolicyLoss",
    "SampledTokens",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
]
