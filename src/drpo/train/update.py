"""One optimiser update, and its learning rate."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from drpo.batch import split_micro_batch
from drpo.critic import Critic
from drpo.errors import InputError
from drpo.objectives import Objective, entropy_bonus, needed_divergence, reference_kl
from drpo.objectives.contract import ask, gradient_of
from drpo.ops import PolicyLoss
from drpo.policy import Policy
from drpo.ranks import ALONE, Ranks
from drpo.types import Batch, MicroBatch, StepStats, TokenStats

log = logging.getLogger("drpo")

SCHEDULES = ("constant", "linear", "cosine")


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    objective: Objective,
    learning_rate: float,
    max_grad_norm: float,
    terms: "Terms | None" = None,
    ranks: Ranks = ALONE,
) -> StepStats:
    """Take one optimiser step on a batch: sum(weight * loss) over its micro-batches, clip the gradient, step.

    Each rank computes some of the micro-batches. All weights are fixed over the whole batch, so the ranks' gradients
    add up to its gradient, and every rank takes the same step.

    A batch with nothing to train on still steps, with a gradient of zero, exactly as it would if its zero-advantage
    completions had gone through the model.

    Args:
        policy: what is trained.
        optimizer: over `policy.trainable()`.
        batch: micro-batches with their weights.
        objective: loss per token.
        learning_rate: of this step.
        max_grad_norm: the gradient is scaled down to this L2 norm, > 0; inf is off.
        terms: additive terms, or None.
        ranks: who share the micro-batches; all have the same batch.

    Returns:
        What was seen and done, by all ranks.

    Raises:
        InputError: a single completion does not fit into memory, or `max_grad_norm` is not above 0.
    """
    parameters = list(policy.trainable().values())
    optimizer.zero_grad(set_to_none=True)
    own, idle = balance_micro_batches(batch.micro_batches, ranks)
    found = _backward_all(policy, optimizer, own, batch, objective, terms)
    for micro in idle if policy.equal_passes else ():
        _backward(policy, micro, objective, terms)
    policy.reduce_gradients(ranks)
    found = ranks.gather(found)
    loss = sum(share for share, _ in found)
    norm = take_step(optimizer, parameters, learning_rate, max_grad_norm)
    token_stats = TokenStats.cat([seen for _, seen in found]) if found else TokenStats.none(bool(objective.needs))
    return StepStats(token_stats, loss, norm, learning_rate, taken=math.isfinite(norm))


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """Scale the parameters' gradient down to an L2 norm, let the optimiser step, and return the norm that it had.

    Where that is not finite no step is taken, and nothing is changed.

    Raises:
        InputError: `max_grad_norm` is not above 0: no gradient would be left.
    """
    if not max_grad_norm > 0:
        raise InputError(f"max_grad_norm={max_grad_norm}: must be above 0; inf turns clipping off")
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total_norm = total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm
    norm = float(total_norm)
    if math.isfinite(norm):
        if norm > max_grad_norm:  # asked here, because a scaling by 1 would still pass over all of it
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return norm


def _backward_all(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    batch: Batch,
    objective: Objective,
    terms: "Terms | None",
) -> list[tuple[float, TokenStats]]:
    """Add the gradients of all micro-batches; where one does not fit into memory, begin again with it in halves.

    What it left of its gradient cannot be told from the others', so these are computed again too. The policy remembers
    what did not fit, and later updates begin with smaller ones. Ranks that meet in every pass cannot do this alone.
    """
    todo = [part for micro in micro_batches for part in _fitting(micro, batch, policy)]
    while True:
        found: list[tuple[float, TokenStats]] = []
        try:
            for micro in todo:
                found.append(_backward(policy, micro, objective, terms))
            return found
        except torch.OutOfMemoryError:
            if policy.equal_passes:
                raise
        micro = todo[len(found)]
        if len(micro.sequence.unique()) == 1:
            raise InputError(
                f"out of memory with a single completion of {len(micro.input_ids)} tokens: lower "
                "sampling.max_new_tokens, or set --precision bf16, --lora-rank or --shard fsdp"
            )
        policy.most_places = (len(micro.input_ids) + 1) // 2
        log.warning(
            "out of memory with a micro-batch of %d places; going on with at most %d (--micro-batch-tokens)",
            len(micro.input_ids),
            policy.most_places,
        )
        optimizer.zero_grad(set_to_none=True)
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()
        todo = [part for micro in todo for part in _fitting(micro, batch, policy)]


def _fitting(micro: MicroBatch, batch: Batch, policy: Policy) -> list[MicroBatch]:
    """A micro-batch in parts that have fitted so far."""
    if policy.most_places is None or len(micro.input_ids) <= policy.most_places:
        return [micro]
    return split_micro_batch(micro, batch.credits, policy.most_places, policy.shares_prompts)


def _backward(
    policy: Policy, micro: MicroBatch, objective: Objective, terms: "Terms | None"
) -> tuple[float, TokenStats]:
    """Add a micro-batch's gradient; return its share of the loss, and its tokens' statistics on the CPU."""
    here = micro.to(policy.device)
    found = policy.loss(here, objective) if terms is None else terms.loss(policy, here, objective)
    found.loss.backward()
    tokens = here.tokens(found.logp, found.divergence)
    return float(found.loss.detach()), TokenStats(tokens, found.entropy, found.gradient, found.metrics).cpu()


def balance_micro_batches(
    micro_batches: Sequence[MicroBatch], ranks: Ranks
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Return the micro-batches that this rank computes: the largest first, each to the rank with the least to do.

    Args:
        micro_batches: of a batch, the same on all ranks.
        ranks: among whom.

    Returns:
        This rank's own, and as many that count nothing as make it equal with the rank that has most.
    """
    size = [len(m.input_ids) for m in micro_batches]
    hands: list[list[int]] = [[] for _ in range(ranks.size)]
    for i in sorted(range(len(size)), key=lambda i: -size[i]):
        min(hands, key=lambda hand: sum(size[j] for j in hand)).append(i)
    own = [micro_batches[i] for i in sorted(hands[ranks.rank])]
    missing = max(map(len, hands)) - len(own)
    smallest = min(micro_batches, key=lambda m: len(m.input_ids), default=None)
    idle = [replace(smallest, weight=torch.zeros_like(smallest.weight))] * missing if smallest else []
    return own, idle


class Terms:
    """The additive terms of a run: KL to a frozen reference model (k2) and an entropy bonus.

    Args:
        reference: the frozen model, or None where its coefficient is 0.
        kl: coefficient of KL(pi || reference), >= 0.
        entropy: coefficient of the entropy bonus, >= 0.
    """

    def __init__(self, reference: Policy | None, kl: float, entropy: float) -> None:
        self.reference, self.kl, self.entropy = reference, kl, entropy

    def loss(self, policy: Policy, micro: MicroBatch, objective: Objective) -> PolicyLoss:
        """As `Policy.loss`, with the terms added to every token's loss."""
        kind = needed_divergence(objective.needs)
        divergence = None
        if kind is None:
            logp, entropy = policy(micro)
        else:
            logp, entropy, moved = policy.divergence(micro, (kind,))
            divergence = moved[kind]
        tokens = micro.tokens(logp, divergence)
        seen = ask(objective, tokens)
        extra = entropy_bonus(entropy, self.entropy)
        if self.reference is not None:
            with torch.no_grad():
                reference_logp, _ = self.reference(micro)
            extra = extra + self.kl * reference_kl(logp, reference_logp, micro.behavior_logp)
        share = (micro.weight * seen.loss).sum() + (micro.weight * extra).sum()
        gradient = gradient_of(objective, seen, tokens)
        return PolicyLoss(share, logp.detach(), entropy.detach(), gradient, seen.metrics, divergence)


def scheduled(peak: float, schedule: str, *, index: int, warmup: int, total: int) -> float:
    """Return the learning rate of update `index` of `total`.

    It rises linearly over the first `warmup` updates, then stays ("constant"), or falls towards 0, which it would reach
    one update after the last, along a line ("linear") or half a cosine ("cosine").

    Args:
        peak: highest learning rate.
        schedule: "constant", "linear" or "cosine".
        index: in [0, total).
        warmup: >= 0, in updates.
        total: updates of the whole run.

    Example:
        >>> [scheduled(1.0, "linear", index=i, warmup=2, total=6) for i in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if index < warmup:
        return peak * (index + 1) / warmup
    if schedule == "constant":
        return peak
    left = 1 - (index - warmup) / max(1, total - warmup)
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def make_optimizer(
    model: Policy | Critic, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; weight decay on matrices only, not on norms and biases."""
    parameters = list(model.trainable().values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)
