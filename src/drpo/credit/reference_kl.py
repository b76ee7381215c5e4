"""KL to a reference model as a reward per token, which credit assigns to the tokens before it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drpo.credit.overlong import PART as OVERLONG
from drpo.types import Episode, RewardResult, ScoredGroup

PART = "reference_kl"
"""Name of the reward's part in the metrics: the sum over an episode's tokens."""


def with_reference_kl(
    groups: Sequence[ScoredGroup], reference_logp: Sequence[Tensor], coefficient: float
) -> list[ScoredGroup]:
    """Subtract the KL to a reference (k1) from the reward of every sampled token.

        r_t <- r_t - coefficient (log mu(x_t) - log ref(x_t))

    mu is the sampler's distribution. A token's credit includes all later rewards, so on-policy the expected gradient is
    exactly that of E[R] - coefficient KL(pi || ref) over whole texts. The loss term k2
    (`drpo.objectives.reference_kl`) is not exact for whole texts. The KL goes into
    `RewardResult.penalties`, and its sum over an episode into the part `PART`; the task's own rewards stay as they are.

    Args:
        groups: the groups of a rollout.
        reference_logp: [M] for each of their sequences, in order, nats.
        coefficient: reward units per nat, >= 0.

    Source: Ouyang et al., arXiv 2203.02155, Section 3.5; verl's `use_kl_in_reward`.
    """
    columns = iter(reference_logp)

    def penalised(episode: Episode, result: RewardResult) -> RewardResult:
        behavior_logp = torch.cat([s.behavior_logp for s in episode.sequences])
        penalty = -coefficient * (behavior_logp - torch.cat([next(columns) for _ in episode.sequences]))
        parts = {**result.parts, PART: float(penalty.sum())}
        return replace(result, parts=parts, penalties=tuple(penalty.tolist()))

    return [replace(g, results=tuple(map(penalised, g.episodes, g.results))) for g in groups]


def without_reference_kl(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """Return groups whose tokens' penalties are those of length alone; the parts of their rewards stay.

    Args:
        groups: with what `with_reference_kl` and then `drpo.credit.overlong` made of their penalties.
    """
    return [replace(g, results=tuple(map(_of_length_alone, g.results))) for g in groups]


def _of_length_alone(result: RewardResult) -> RewardResult:
    n, of_length = len(result.penalties), result.parts.get(OVERLONG, 0.0)
    return replace(result, penalties=(*(0.0,) * (n - 1), of_length) if of_length and n else ())
