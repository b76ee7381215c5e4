"""Log-probabilities that an objective reads besides the policy's: a proximal policy's, or a reference model's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from drpo.model.policy import Policy
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.routing import with_sequences
from drpo.train.step import per_sequence
from drpo.types import ScoredGroup, TokenSequence


@dataclass(frozen=True, eq=False)
class LogpPass:
    """Asks a model, before the updates of a rollout, for the log-probabilities of its tokens: one forward pass.

    Args:
        column: "proximal_logp" or "reference_logp", of `TokenSequence`.
        policy: the model in training, which is its own proximal policy then, or the frozen reference model.
        micro_batch_tokens: upper bound of positions per micro-batch; a single completion may exceed it.
        ranks: the processes that share the micro-batches; all have the same groups.

    Source: Hilton et al. 2021, "Batch size-invariance for policy optimization" (arXiv:2110.00641), the proximal policy.
    """

    column: str
    policy: Policy
    micro_batch_tokens: int
    ranks: Ranks = SINGLE_PROCESS

    @torch.no_grad()
    def add_to(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups with the model's present log-probabilities in each sequence that has a score."""
        logp = iter(
            per_sequence(self.policy, groups, lambda micro: self.policy(micro)[0], self.micro_batch_tokens, self.ranks)
        )

        def with_logp(sequence: TokenSequence) -> TokenSequence:
            column: dict[str, Any] = {self.column: next(logp)}
            return replace(sequence, **column)

        return with_sequences(groups, with_logp)
