"""Routing replay of the trainer's own choices: the experts of its first pass over a rollout hold in all its updates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from drpo.batch import routes_of_rows
from drpo.model.policy import Policy
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train.step import per_row
from drpo.types import Credit, Episode, MicroBatch, Routes, ScoredGroup, TokenSequence


@dataclass(frozen=True, eq=False)
class FirstPass:
    """Asks the policy, before the updates of a rollout, which experts it chooses for the rollout's tokens.

    Args:
        policy: the model in training; it replays.
        micro_batch_tokens: upper bound of positions per micro-batch; a single completion may exceed it.
        ranks: the processes that share the micro-batches; all have the same groups.

    Source: Zheng et al. 2025, "Group sequence policy optimization" (arXiv:2507.18071), "routing replay".
    """

    policy: Policy
    micro_batch_tokens: int
    ranks: Ranks = SINGLE_PROCESS

    @torch.no_grad()
    def add_to(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups with the policy's present choice in each sequence that has a score."""
        routes = iter(per_row(self.policy, groups, self._of_rows, self.micro_batch_tokens, self.ranks))
        return with_sequences(groups, lambda sequence: replace(sequence, routes=next(routes)))

    def _of_rows(self, micro: MicroBatch, credits: Sequence[Credit]) -> list[tuple[int, Routes]]:
        routes = self.policy.routes(micro).cpu()
        return routes_of_rows(micro.to(routes.device), credits, self.policy.shares_prompts, routes)


def with_sequences(
    groups: Sequence[ScoredGroup], changed: Callable[[TokenSequence], TokenSequence]
) -> list[ScoredGroup]:
    """Return the groups with others in place of the sequences of their scored episodes, changed in order."""
    return [
        _with_episodes(g, [replace(e, sequences=tuple(map(changed, e.sequences))) for e in g.episodes]) for g in groups
    ]


def _with_episodes(group: ScoredGroup, episodes: Sequence[Episode]) -> ScoredGroup:
    """Return the group with others in place of its scored episodes."""
    new = dict(zip(group.episodes, episodes, strict=True))
    zero = tuple(replace(u, episode=new[u.episode]) for u in group.scored_zero)
    return replace(group, episodes=tuple(episodes), scored_zero=zero)
