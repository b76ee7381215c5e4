"""Credit rules: how the rewards of a rollout become an advantage for every sampled token.

Shapes: G episodes of a group, T turns of an episode, K steps of a turn (its sampled tokens where one of the group's
episodes has rewards per token, else one), M sampled tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import starmap
from typing import TypeAlias

import torch
from torch import Tensor

from drpo.credit.advantages import Advantage
from drpo.credit.gae import GAE, gae, whitened
from drpo.types import Credit, Episode, RewardResult, ScoredGroup

CreditRule: TypeAlias = Callable[[Sequence[ScoredGroup], Sequence[Tensor] | None], list[Credit]]
"""The groups of all ranks and a critic's values, [M] for each sequence in order (None without a critic) -> the credit
of each sequence, in order. Pure. Sequences that the rule leaves out have no credit and are not trained."""


def credit_rule(advantage: Advantage, critic: GAE | None = None, discount: float = 1.0) -> CreditRule:
    """Return the rule of a run: its critic's where it has one, else the comparison of each group.

    Args:
        advantage: rewards of a group -> advantages; unused with a critic.
        critic: how its values become advantages, or None.
        discount: of a reward for each turn that it lies ahead, (0, 1]; unused with a critic, which has its own.
    """
    if critic is None:
        return partial(group_credit, advantage=advantage, discount=discount)
    return partial(gae_credit, critic=critic)


def group_credit(
    groups: Sequence[ScoredGroup],
    values: Sequence[Tensor] | None = None,
    *,
    advantage: Advantage,
    discount: float = 1.0,
) -> list[Credit]:
    """Compare the episodes of each group by what is still to come at every token, as `step_advantages` says.

    A group of fewer than two episodes has nothing to compare and is left out.

    Args:
        groups: of a rollout.
        values: unused.
        advantage: rewards of a group -> advantages.
        discount: of a reward for each turn that it lies ahead, (0, 1].

    Example:
        >>> from drpo.credit.advantages import mean
        >>> group_credit([], advantage=mean)
        []
    """
    return [c for group in groups if len(group.episodes) >= 2 for c in _compared(group, advantage, discount)]


def _compared(group: ScoredGroup, advantage: Advantage, discount: float) -> list[Credit]:
    by_token = any(isinstance(turn, tuple) for result in group.results for turn in result.turns)
    lengths = [e.turns if by_token else (1,) * len(e.turns) for e in group.episodes]
    rewards = [turn_rewards(result, n) for result, n in zip(group.results, lengths, strict=True)]
    advantages = step_advantages(rewards, advantage, discount)
    return [credit for e, a in zip(group.episodes, advantages, strict=True) for credit in _by_turn(e, a)]


def _by_turn(episode: Episode, advantages: Sequence[Tensor]) -> list[Credit]:
    """Give an episode's sampled tokens their advantages: of each turn one number, or one for each token."""
    by_token = torch.cat([a.expand(n) for a, n in zip(advantages, episode.turns, strict=True)])
    by_sequence = by_token.split([s.n_sampled for s in episode.sequences])
    return list(starmap(Credit, zip(episode.sequences, by_sequence, strict=True)))


def turn_rewards(result: RewardResult, lengths: Sequence[int]) -> list[Tensor]:
    """Return what came with each step of each turn, [K_t] float32; one number for a turn comes with its last step.

    The episode's total comes with the last step of all, besides.

    Args:
        result: of an episode.
        lengths: K_t of each turn, >= 1: its sampled tokens, or 1 where no turn has rewards per token.

    Example:
        >>> turn_rewards(RewardResult(1.0), [1, 1]), turn_rewards(RewardResult(1.0, turns=(0.25, (0.5, 0.0))), [1, 2])
        ([tensor([0.]), tensor([1.])], [tensor([0.2500]), tensor([0.5000, 1.0000])])
    """
    given = result.turns or (0.0,) * len(lengths)
    steps = [
        turn if isinstance(turn, tuple) else (*(0.0,) * (n - 1), turn) for turn, n in zip(given, lengths, strict=True)
    ]
    rewards = [torch.tensor(turn, dtype=torch.float32) for turn in steps]
    rewards[-1][-1] += result.total
    return rewards


def step_advantages(
    rewards: Sequence[Sequence[Tensor]], advantage: Advantage, discount: float = 1.0
) -> list[list[Tensor]]:
    """Return the advantage of every step of the turns of one group's episodes.

        R_{t,k} = sum_{l >= k} r_{t,l} + discount R_{t+1,0},    A_{i,t,k} = advantage(R_{1,t',k'}, .., R_{G,t',k'})_i

    with t' = min(t, T_j - 1) and k' = min(k, K_{j,t'} - 1): an episode or a turn that is over stays in the comparison
    with the return of its last step. With one reward, at the end, and discount 1 every step has the outcome's
    advantage, bit for bit.

    Args:
        rewards: [K_{i,t}] float32 for each turn of each of the G episodes, K >= 1; what came with each step (the
            turn as a whole, or each of its tokens), reward units.
        advantage: rewards of a group -> advantages.
        discount: of each turn that lies between, (0, 1]; between the steps of a turn there is none.

    Returns:
        [K_{i,t}] float32 for each turn of each episode.

    Example:
        >>> from drpo.credit.advantages import mean
        >>> step_advantages([[torch.tensor([1.0]), torch.tensor([1.0])], [torch.tensor([4.0])]], mean)
        [[tensor([-1.]), tensor([-1.5000])], [tensor([1.])]]
    """
    returns = [_returns(r, discount) for r in rewards]
    turns: list[list[Tensor]] = [[] for _ in returns]
    for t in range(max(map(len, returns))):
        now = [r[min(t, len(r) - 1)] for r in returns]
        longest = max(map(len, now))
        steps = torch.stack([torch.cat([r, r[-1:].expand(longest - len(r))]) for r in now], dim=1)
        compared = torch.stack([advantage(step) for step in steps])
        for i, r in enumerate(returns):
            if t < len(r):
                turns[i].append(compared[: len(r[t]), i])
    return turns


def _returns(rewards: Sequence[Tensor], discount: float) -> list[Tensor]:
    """[K_t] float32 the sums of what is still to come, of each turn; added up in float64."""
    following = torch.zeros((), dtype=torch.float64)
    returns: list[Tensor] = []
    for reward in reversed(rewards):
        returns.append(reward.double().flip(0).cumsum(0).flip(0) + discount * following)
        following = returns[-1][0]
    return [r.float() for r in reversed(returns)]


def gae_credit(groups: Sequence[ScoredGroup], values: Sequence[Tensor] | None, *, critic: GAE) -> list[Credit]:
    """Estimate every token's advantage from the critic's values; one number for a turn comes with its last token.

    The advantages of the whole rollout are whitened together where `critic.whiten` says so.

    Args:
        groups: of a rollout; a group of one episode is as good as any.
        values: [M] of each sequence, in order: of the context that each token was drawn in, reward units.
        critic: discount, lambda and whitening.
    """
    episodes = [e for group in groups for e in group.episodes]
    sequences = [s for e in episodes for s in e.sequences]
    if not sequences:
        return []
    assert values is not None
    value, counts = torch.cat(list(values)), torch.tensor([e.n_sampled for e in episodes])
    results = [result for group in groups for result in group.results]
    reward = torch.cat([r for e, result in zip(episodes, results, strict=True) for r in turn_rewards(result, e.turns)])
    episode = torch.arange(len(episodes)).repeat_interleave(counts)
    advantage, returns = gae(reward, value, episode, critic.gamma, critic.lam)
    advantage = whitened(advantage) if critic.whiten else advantage
    columns = [column.split([s.n_sampled for s in sequences]) for column in (advantage, value, returns)]
    return list(starmap(Credit, zip(sequences, *columns, strict=True)))
