"""What an objective sees of an exact problem besides a draw's own numbers: the batch, and the proximal policy."""

from dataclasses import replace

import torch
from torch import Tensor

from drpo.objectives import Objective, Tokens, of_batch, reads_batch

DRAWS = 1 << 16
"""Draws of the batch that stands for the sampler's distribution in statistics of the batch."""


def proportional(distribution: Tensor, draws: int = DRAWS) -> Tensor:
    """Return how often each possible draw is in a batch that has them in proportion, [N] int64, by largest remainders.

    Example:
        >>> proportional(torch.tensor([0.5, 0.3, 0.2]), 4)
        tensor([2, 1, 1])
    """
    wanted = distribution.double() * draws
    counts = wanted.floor().long()
    rest = draws - int(counts.sum())
    counts[(wanted - counts).argsort(descending=True, stable=True)[:rest]] += 1
    return counts


def with_statistics(objective: Objective, tokens: Tokens, counts: Tensor) -> Objective:
    """Return the objective with the statistics of a batch in which token i comes `counts[i]` times.

    Args:
        objective: any; returned as it is if it reads no batch.
        tokens: T tokens.
        counts: [T] int64.
    """
    if not reads_batch(objective):
        return objective
    copies = torch.arange(len(counts)).repeat_interleave(counts)
    columns = {name: None if x is None else x.detach()[copies] for name, x in vars(tokens).items()}
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]])
    turn = torch.arange(len(copies)) - first[copies]  # each copy of a sequence is a sequence of its own
    sequence = columns["sequence"]
    assert sequence is not None
    return of_batch(objective, Tokens(**{**columns, "sequence": sequence * int(counts.max()) + turn}))


def between(tokens: Tokens, share: float = 0.5) -> Tokens:
    """Return the tokens with a proximal policy on the way from the sampler to the policy, in log-probabilities."""
    return replace(tokens, proximal_logp=tokens.behavior_logp + share * (tokens.logp.detach() - tokens.behavior_logp))
