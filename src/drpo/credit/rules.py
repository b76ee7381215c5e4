"""Credit rules: how the rewards of a rollout become an advantage for every sampled token.

Shapes: G episodes of a group, T steps of an episode (its turns; one of a single turn has one), M sampled tokens of a
sequence.
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
    """Compare the episodes of each group: every token of a turn has the advantage of the turn's return.

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
    rewards = [turn_rewards(result, len(e.turns)) for e, result in zip(group.episodes, group.results, strict=True)]
    advantages = step_advantages(rewards, advantage, discount)
    return [credit for e, a in zip(group.episodes, advantages, strict=True) for credit in _by_turn(e, a)]


def _by_turn(episode: Episode, advantages: Tensor) -> list[Credit]:
    """Give every sampled token of an episode its turn's advantage, of [T]."""
    by_token = advantages.repeat_interleave(torch.tensor(episode.turns))
    by_sequence = by_token.split([s.n_sampled for s in episode.sequences])
    return list(starmap(Credit, zip(episode.sequences, by_sequence, strict=True)))


def turn_rewards(result: RewardResult, n_turns: int) -> Tensor:
    """Return what came with each turn, [T] float32: the turn's own reward, and at the last the episode's total besides.

    Args:
        result: of an episode.
        n_turns: T, >= 1.

    Example:
        >>> turn_rewards(RewardResult(1.0), 2), turn_rewards(RewardResult(1.0, turns=(0.25, 0.5)), 2)
        (tensor([0., 1.]), tensor([0.2500, 1.5000]))
    """
    rewards = torch.tensor(result.turns or (0.0,) * n_turns, dtype=torch.float32)
    rewards[-1] += result.total
    return rewards


def step_advantages(rewards: Sequence[Tensor], advantage: Advantage, discount: float = 1.0) -> list[Tensor]:
    """Return the advantage of every step of the episodes of one group.

        R_t = sum_{u >= t} discount^(u - t) r_u,    A_{i,t} = advantage(R_{1, min(t, T_1 - 1)}, ..)_i

    An episode that is over stays in the comparison with the return of its last step. With one reward, at the end, and
    discount 1 every step has the outcome's advantage, bit for bit.

    Args:
        rewards: [T_i] float32 for each of the G episodes, T_i >= 1; what came with each step, reward units.
        advantage: rewards of a group -> advantages.
        discount: (0, 1].

    Returns:
        [T_i] float32 for each episode.

    Example:
        >>> from drpo.credit.advantages import mean
        >>> step_advantages([torch.tensor([1.0, 1.0]), torch.tensor([4.0])], mean)
        [tensor([-1.0000, -1.5000]), tensor([1.])]
    """
    returns = [_returns(r, discount) for r in rewards]
    steps = max(map(len, returns))
    rows = [advantage(torch.stack([r[min(t, len(r) - 1)] for r in returns])) for t in range(steps)]
    return [torch.stack(rows)[: len(r), i] for i, r in enumerate(returns)]


def _returns(reward: Tensor, discount: float) -> Tensor:
    """[T] the discounted sums of what is still to come: without values and with lambda 1 they are the advantages."""
    one_episode = torch.zeros(len(reward), dtype=torch.int64)
    return gae(reward, torch.zeros_like(reward), one_episode, discount, 1.0)[0]


def gae_credit(groups: Sequence[ScoredGroup], values: Sequence[Tensor] | None, *, critic: GAE) -> list[Credit]:
    """Estimate every token's advantage from the critic's values; a turn's reward comes with its last token.

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
    turn_ends = torch.tensor([n for e in episodes for n in e.turns]).cumsum(0)
    results = [result for group in groups for result in group.results]
    reward = torch.zeros_like(value)
    reward[turn_ends - 1] = torch.cat([turn_rewards(r, len(e.turns)) for e, r in zip(episodes, results, strict=True)])
    episode = torch.arange(len(episodes)).repeat_interleave(counts)
    advantage, returns = gae(reward, value, episode, critic.gamma, critic.lam)
    advantage = whitened(advantage) if critic.whiten else advantage
    columns = [column.split([s.n_sampled for s in sequences]) for column in (advantage, value, returns)]
    return list(starmap(Credit, zip(sequences, *columns, strict=True)))
