"""One optimiser step, of a policy or a critic: add up the gradients of a batch, clip, step."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drpo.batch import pack, split_micro_batch
from drpo.errors import InputError
from drpo.model.policy import Policy
from drpo.objectives import Objective
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.auxiliary import AuxiliaryLosses
from drpo.types import Batch, Credit, MicroBatch, ScoredGroup, StepStats, TokenStats

T = TypeVar("T")

log = logging.getLogger("drpo")


class Trainable(Protocol):
    """A model in training: a policy or a critic.

    Attributes:
        shares_prompts: whether a group's prompt goes through the model once.
        max_positions: of a micro-batch that memory has room for, where that was found out; else None.
    """

    shares_prompts: bool
    max_positions: int | None

    @property
    def equal_passes(self) -> bool:
        """True where all ranks must make as many forward and backward passes, because they meet in them."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Add up the gradients of all ranks; afterwards every trainable parameter has one, if only of zero."""


def optimize(
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    backward: Callable[[MicroBatch], T],
    *,
    learning_rate: float,
    max_grad_norm: float,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[list[T], float]:
    """Take one optimiser step on a batch: add up the gradients of its micro-batches, clip the sum, step.

    Each rank computes some of the micro-batches. All weights are fixed over the whole batch, so the ranks' gradients
    add up to its gradient, and every rank takes the same step. A batch with nothing to train on still steps, with a
    gradient of zero. Where the gradient's norm is not finite no step is taken.

    Args:
        model: what is trained.
        optimizer: over `model.trainable()`.
        batch: micro-batches with their weights.
        backward: adds the gradient of a micro-batch, on the model's device, and returns what is to be known of it.
        learning_rate: of this step.
        max_grad_norm: the gradient is scaled down to this L2 norm, > 0; inf is off.
        ranks: who share the micro-batches; all have the same batch.

    Returns:
        What `backward` returned for the micro-batches of all ranks, and the gradient's L2 norm before clipping.

    Raises:
        InputError: a single completion does not fit into memory, or `max_grad_norm` is not above 0.
    """
    parameters = list(model.trainable().values())

    def begin() -> None:
        optimizer.zero_grad(set_to_none=True)

    local, idle = balance_micro_batches(batch.micro_batches, ranks)
    results = within_memory(model, local, batch.credits, backward, begin)
    for micro in idle if model.equal_passes else ():
        backward(micro.to(model.device))
    model.reduce_gradients(ranks)
    results = ranks.gather(results)
    return results, take_step(optimizer, parameters, learning_rate, max_grad_norm)


def update_policy(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    objective: Objective,
    learning_rate: float,
    max_grad_norm: float,
    auxiliary: AuxiliaryLosses | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> StepStats:
    """Take one optimiser step of the policy on sum(weight * loss) over a batch.

    Args:
        policy: what is trained.
        optimizer: over `policy.trainable()`.
        batch: as of `optimize`, like the rest.
        objective: loss per token.
        learning_rate: of this step.
        max_grad_norm: the gradient is scaled down to this L2 norm, > 0; inf is off.
        auxiliary: losses added to the objective's, or None.
        ranks: who share the micro-batches.

    Returns:
        What was seen and done, by all ranks.
    """

    def backward(micro: MicroBatch) -> tuple[float, TokenStats]:
        losses = policy.loss(micro, objective) if auxiliary is None else auxiliary.loss(policy, micro, objective)
        losses.loss.backward()
        tokens = micro.tokens(losses.logp, losses.divergence)
        return float(losses.loss.detach()), TokenStats(tokens, losses.entropy, losses.gradient, losses.metrics).cpu()

    results, norm = optimize(
        policy, optimizer, batch, backward, learning_rate=learning_rate, max_grad_norm=max_grad_norm, ranks=ranks
    )
    token_stats = TokenStats.cat([seen for _, seen in results]) if results else TokenStats.none(bool(objective.needs))
    loss = sum(share for share, _ in results)
    return StepStats(token_stats, loss, norm, learning_rate, taken=math.isfinite(norm))


def per_sequence(
    model: Trainable,
    groups: Sequence[ScoredGroup],
    compute: Callable[[MicroBatch], Tensor],
    micro_batch_tokens: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[Tensor]:
    """Return a model's figure of every sampled token, [M] of each sequence of the groups, in order, on the CPU.

    Args:
        model: that computes; each rank computes some.
        groups: of a rollout, the same on all ranks.
        compute: the figures [T] of a micro-batch, on the model's device.
        micro_batch_tokens: most places that go through the model at once; one completion always may.
        ranks: among whom.
    """

    def numbered(micro: MicroBatch) -> list[tuple[int, Tensor]]:
        figures, sequence = compute(micro).cpu(), micro.sequence.cpu()
        return [(s, figures[sequence == s]) for s in sequence.unique().tolist()]

    sequences = [s for group in groups for s in group.sequences]
    batch = pack(sequences, micro_batch_tokens, model.shares_prompts, ranks.size)
    local, idle = balance_micro_batches(batch.micro_batches, ranks)
    computed = within_memory(model, local, batch.credits, numbered)
    for micro in idle if model.equal_passes else ():
        numbered(micro.to(model.device))
    pairs = ranks.gather([pair for of_one in computed for pair in of_one])
    return [figures for _, figures in sorted(pairs, key=lambda pair: pair[0])]


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


def within_memory(
    model: Trainable,
    micro_batches: Sequence[MicroBatch],
    credits: Sequence[Credit],
    compute: Callable[[MicroBatch], T],
    begin: Callable[[], None] = lambda: None,
) -> list[T]:
    """Compute something of every micro-batch; where one does not fit into memory, begin again with it in halves.

    A gradient that was left half added cannot be told from the others', so all are computed again. The model remembers
    what did not fit, and later calls begin with smaller micro-batches. Ranks that meet in every pass cannot do this
    alone.

    Args:
        model: that computes.
        micro_batches: of one batch.
        credits: of its completions.
        compute: receives a micro-batch on the model's device.
        begin: is called before the first micro-batch, each time.

    Raises:
        InputError: a single completion does not fit into memory.
    """
    todo = [part for micro in micro_batches for part in _fitting(micro, credits, model)]
    while True:
        begin()
        results: list[T] = []
        try:
            for micro in todo:
                results.append(compute(micro.to(model.device)))
            return results
        except torch.OutOfMemoryError:
            if model.equal_passes:
                raise
        _halve(model, todo[len(results)])
        todo = [part for micro in todo for part in _fitting(micro, credits, model)]


def _halve(model: Trainable, micro: MicroBatch) -> None:
    """Have the model take at most half of a micro-batch that did not fit.

    Raises:
        InputError: it is a single completion.
    """
    if len(micro.sequence.unique()) == 1:
        raise InputError(
            f"out of memory with a single completion of {len(micro.input_ids)} tokens: lower "
            "sampling.max_new_tokens, or set --precision bf16, --lora-rank or --shard fsdp"
        )
    model.max_positions = (len(micro.input_ids) + 1) // 2
    log.warning(
        "out of memory with a micro-batch of %d positions; going on with at most %d (--micro-batch-tokens)",
        len(micro.input_ids),
        model.max_positions,
    )
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _fitting(micro: MicroBatch, credits: Sequence[Credit], model: Trainable) -> list[MicroBatch]:
    """A micro-batch in parts that have fitted so far."""
    if model.max_positions is None or len(micro.input_ids) <= model.max_positions:
        return [micro]
    return split_micro_batch(micro, credits, model.max_positions, model.shares_prompts)


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
