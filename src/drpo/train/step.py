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
from drpo.objectives import Objective, needed_divergence, of_batch, reads_batch
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.auxiliary import AuxiliaryLosses
from drpo.types import Batch, Credit, MicroBatch, ScoredGroup, StepStats, Tokens, TokenStats

T = TypeVar("T")

log = logging.getLogger("drpo")


class Trainable(Protocol):
    """A model in training: a policy or a critic.

    Attributes:
        shares_prompts: True where a group's prompt runs once.
        max_positions: the positions of a micro-batch that fit into memory, if known from a failure; else None.
    """

    shares_prompts: bool
    max_positions: int | None

    @property
    def equal_passes(self) -> bool:
        """True if all ranks must run the same number of forward and backward passes (collectives inside)."""

    @property
    def device(self) -> torch.device:
        """The weights' device."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, by name."""

    def reduce_gradients(self, ranks: Ranks) -> None:
        """Sum the gradients over the ranks; afterwards every trainable parameter has one, possibly zero."""


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

    Each rank computes some of the micro-batches. The weights are fixed over the whole batch, so the ranks' gradients
    sum to its gradient, and every rank takes the same step. A batch without tokens still steps, with a gradient of
    zero. If the gradient's norm is not finite, no step is taken.

    Args:
        model: the model to train.
        optimizer: over `model.trainable()`.
        batch: micro-batches with their weights.
        backward: adds the gradient of a micro-batch on the model's device, and returns its result.
        learning_rate: this step's.
        max_grad_norm: the gradient is scaled down to this L2 norm, > 0; inf is off.
        ranks: the processes that share the micro-batches; all have the same batch.

    Returns:
        The results of `backward` for the micro-batches of all ranks, and the gradient's L2 norm before clipping.

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
        policy: the model to train.
        optimizer: over `policy.trainable()`.
        objective: loss per token.
        auxiliary: losses added to the objective's, or None.
        batch, learning_rate, max_grad_norm, ranks: as for `optimize`.

    Returns:
        The update's statistics, over all ranks.
    """

    def backward(micro: MicroBatch) -> tuple[float, TokenStats, Tensor]:
        losses = policy.loss(micro, objective) if auxiliary is None else auxiliary.loss(policy, micro, objective)
        losses.loss.backward()
        tokens = micro.tokens(losses.logp, losses.divergence)
        metrics = {**losses.metrics, **policy.routing_metrics(micro)}
        stats = TokenStats(tokens, losses.entropy, losses.gradient, metrics)
        return float(losses.loss.detach()), stats.cpu(), micro.row.cpu()

    objective = with_statistics(policy, batch, objective, ranks)
    results, norm = optimize(
        policy, optimizer, batch, backward, learning_rate=learning_rate, max_grad_norm=max_grad_norm, ranks=ranks
    )
    parts = [part for _, part, _ in results]
    token_stats = TokenStats.cat(parts) if parts else TokenStats.none(needed_divergence(objective.needs) is not None)
    row = torch.cat([torch.empty(0, dtype=torch.int64), *(row for _, _, row in results)])
    loss = sum(share for share, _, _ in results)
    return StepStats(token_stats, row, loss, norm, learning_rate, taken=math.isfinite(norm))


def with_statistics(policy: Policy, batch: Batch, objective: Objective, ranks: Ranks = SINGLE_PROCESS) -> Objective:
    """Return the objective with the statistics of the whole optimiser batch that it reads, if it reads any.

    They take a forward pass of all micro-batches without gradient, before the training pass. Every rank gets the same.

    Args:
        policy: as the update finds it.
        batch: all its rows, those of zero advantage included.
        objective: loss per token.
        ranks: the processes that share the micro-batches.
    """
    if not reads_batch(objective) or not batch.micro_batches:
        return objective

    def tokens_of(micro: MicroBatch) -> Tokens:
        with torch.no_grad():
            logp, _ = policy(micro)
        return micro.tokens(logp).cpu()

    local, idle = balance_micro_batches(batch.micro_batches, ranks)
    parts = within_memory(policy, local, batch.credits, tokens_of)
    for micro in idle if policy.equal_passes else ():
        tokens_of(micro.to(policy.device))
    return of_batch(objective, Tokens.cat(ranks.gather(parts)))


def per_sequence(
    model: Trainable,
    groups: Sequence[ScoredGroup],
    compute: Callable[[MicroBatch], Tensor],
    micro_batch_tokens: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[Tensor]:
    """Return a model's value of every sampled token, [M] for each sequence of the groups, in order, on the CPU.

    Args:
        model: computes the values; each rank computes some.
        groups: the groups of a rollout, the same on all ranks.
        compute: micro-batch on the model's device -> values [T].
        micro_batch_tokens: upper bound of positions per micro-batch; a single completion may exceed it.
        ranks: the processes that share the micro-batches.
    """

    def numbered(micro: MicroBatch, credits: Sequence[Credit]) -> list[tuple[int, Tensor]]:
        figures, row = compute(micro).cpu(), micro.row.cpu()
        return [(i, figures[row == i]) for i in row.unique().tolist()]

    return per_row(model, groups, numbered, micro_batch_tokens, ranks)


def per_row(
    model: Trainable,
    groups: Sequence[ScoredGroup],
    compute: Callable[[MicroBatch, Sequence[Credit]], list[tuple[int, T]]],
    micro_batch_tokens: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[T]:
    """Return what a model computes of every sequence of the groups, in order.

    Args:
        compute: micro-batch on the model's device, credits of its batch -> the number of each of its rows, with what
            was computed of it, on the CPU.
        model, groups, micro_batch_tokens, ranks: as for `per_sequence`.
    """
    sequences = [s for group in groups for s in group.sequences]
    batch = pack(sequences, micro_batch_tokens, model.shares_prompts, ranks.size)
    local, idle = balance_micro_batches(batch.micro_batches, ranks)
    computed = within_memory(model, local, batch.credits, lambda micro: compute(micro, batch.credits))
    for micro in idle if model.equal_passes else ():
        compute(micro.to(model.device), batch.credits)
    pairs = ranks.gather([pair for of_one in computed for pair in of_one])
    return [of_row for _, of_row in sorted(pairs, key=lambda pair: pair[0])]


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """Clip the parameters' gradient to an L2 norm, take the step, and return the norm before clipping.

    If the norm is not finite, no step is taken and nothing changes.

    Raises:
        InputError: `max_grad_norm` is not above 0: no gradient would be left.
    """
    if not max_grad_norm > 0:
        raise InputError(f"max_grad_norm={max_grad_norm}: must be above 0; inf turns clipping off")
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total_norm = total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm
    norm = float(total_norm)
    if math.isfinite(norm):
        if norm > max_grad_norm:  # scaling by 1 would still read and write every gradient
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
    """Compute every micro-batch; if memory runs out, split the failed micro-batch and start over.

    A partly added gradient cannot be separated from the others, so all are computed again. The model remembers what did
    not fit, and later calls start with smaller micro-batches. Models with collectives in every pass raise instead.

    Args:
        model: the model that computes.
        micro_batches: the micro-batches of one batch.
        credits: of its rows.
        compute: receives a micro-batch on the model's device.
        begin: called before the first micro-batch of each attempt.

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
        except RuntimeError as error:
            if model.equal_passes or not _is_out_of_memory(error):
                raise
        _halve(model, todo[len(results)], credits)
        todo = [part for micro in todo for part in _fitting(micro, credits, model)]


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory; torch has no class of its own for Apple's."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)


def _halve(model: Trainable, micro: MicroBatch, credits: Sequence[Credit]) -> None:
    """Set the model's limit to half of a micro-batch that did not fit.

    Raises:
        InputError: the micro-batch is a single completion, with the rows that must stay together.
    """
    if len(split_micro_batch(micro, credits, 1, model.shares_prompts)) == 1:
        raise InputError(
            f"out of memory with a single completion of {len(micro.input_ids)} tokens: lower "
            "sampling.max_new_tokens, or set --checkpoint-activations on, --precision bf16, --lora-rank or --shard fsdp"
        )
    model.max_positions = (len(micro.input_ids) + 1) // 2
    log.warning(
        "out of memory with a micro-batch of %d positions; going on with at most %d (--micro-batch-tokens)",
        len(micro.input_ids),
        model.max_positions,
    )
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    elif model.device.type == "mps":
        torch.mps.empty_cache()


def _fitting(micro: MicroBatch, credits: Sequence[Credit], model: Trainable) -> list[MicroBatch]:
    """Return a micro-batch in parts within the model's limit."""
    if model.max_positions is None or len(micro.input_ids) <= model.max_positions:
        return [micro]
    return split_micro_batch(micro, credits, model.max_positions, model.shares_prompts)


def balance_micro_batches(
    micro_batches: Sequence[MicroBatch], ranks: Ranks
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Return the micro-batches of this rank: the largest first, each to the rank with the least work.

    Args:
        micro_batches: a batch's micro-batches, the same on all ranks.
        ranks: the processes that share them.

    Returns:
        This rank's micro-batches, and as many with weights of 0 as equalise the number over the ranks.
    """
    size = [len(m.input_ids) for m in micro_batches]
    shards: list[list[int]] = [[] for _ in range(ranks.size)]
    for i in sorted(range(len(size)), key=lambda i: -size[i]):
        min(shards, key=lambda shard: sum(size[j] for j in shard)).append(i)
    local_batches = [micro_batches[i] for i in sorted(shards[ranks.rank])]
    missing = max(map(len, shards)) - len(local_batches)
    smallest = min(micro_batches, key=lambda m: len(m.input_ids), default=None)
    idle = [replace(smallest, weight=torch.zeros_like(smallest.weight))] * missing if smallest else []
    return local_batches, idle
