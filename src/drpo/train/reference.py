"""A frozen reference model whose KL counts in the reward of every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drpo.credit.reference_kl import with_reference_kl
from drpo.model.policy import Policy
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.step import per_sequence
from drpo.types import ScoredGroup


@dataclass(frozen=True, eq=False)
class ReferenceReward:
    """The KL to a reference model, subtracted from the rewards of tokens.

    Args:
        reference: the frozen model.
        coefficient: reward units per nat, > 0.
        micro_batch_tokens: upper bound of positions per micro-batch; a single completion may exceed it.
        ranks: the processes that share the micro-batches; all have the same groups.
    """

    reference: Policy
    coefficient: float
    micro_batch_tokens: int
    ranks: Ranks = SINGLE_PROCESS

    @torch.no_grad()
    def add_to(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups with the KL in the rewards of their tokens; see `drpo.credit.reference_kl`."""
        logp = per_sequence(
            self.reference, groups, lambda micro: self.reference(micro)[0], self.micro_batch_tokens, self.ranks
        )
        return with_reference_kl(groups, logp, self.coefficient)
