"""Credit rules: how the rewards of a rollout become an advantage for every sampled token.

Shapes: G episodes of a group, T turns of an episode, K steps of a turn (its sampled tokens where one of the group's
episodes has rewards per token, else one), M sampled tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import starmap
from typing import TypeAlias

import torch
from torch import Tensor

from drpo.checks import SAME
from drpo.credit.advantages import REGISTRY, Advantage, gdpo
from drpo.credit.gae import GAE, gae, whitened
from drpo.types import Credit, Episode, RewardResult, ScoredGroup

CreditRule: TypeAlias = Callable[[Sequence[ScoredGroup], Sequence[Tensor] | None], list[Credit]]
"""(groups of all ranks, critic's values [M] per sequence in order, or None) -> the credit of each sequence, in order.
A pure function. Sequences without credit are not trained."""


def credit_rule(
    advantage: Advantage,
    critic: GAE | None = None,
    discount: float = 1.0,
    whiten: bool = False,
    drop_equal: bool = False,
) -> CreditRule:
    """Return a run's credit rule: `gae_credit` with a critic, `group_credit` without.

    Args:
        advantage: rewards of a group -> advantages; unused with a critic.
        critic: the critic's settings, or None.
        discount: factor per turn between a token and a later reward, (0, 1]; unused with a critic (`GAE.gamma`).
        whiten: whiten the advantages of the whole rollout together; unused with a critic (`GAE.whiten`).
        drop_equal: leave out groups whose rewards are all equal; unused with a critic.
    """
    if critic is None:
        return partial(group_credit, advantage=advantage, discount=discount, whiten=whiten, drop_equal=drop_equal)
    return partial(gae_credit, critic=critic)


def group_credit(
    groups: Sequence[ScoredGroup],
    values: Sequence[Tensor] | None = None,
    *,
    advantage: Advantage,
    discount: float = 1.0,
    whiten: bool = False,
    drop_equal: bool = False,
) -> list[Credit]:
    """Return credit from comparing the returns within each group at every token; see `step_advantages`.

    Groups of fewer than two episodes are left out. `gdpo` compares whole episodes, by each part of their reward, and
    its advantages are then divided by their root mean square over the rollout's episodes: their standard deviation, for
    their mean is 0.

    Args:
        groups: the groups of a rollout.
        values: unused.
        advantage: rewards of a group -> advantages.
        discount: factor per turn between a token and a later reward, (0, 1].
        whiten: shift and scale the advantages of the rollout's tokens to mean 0 and standard deviation 1, as
            REINFORCE++ does (arXiv 2501.03262); see `drpo.credit.gae.whitened`.
        drop_equal: leave out groups that teach nothing (`teaches_nothing`), so that the normaliser does not count their
            tokens; the filter of DAPO (arXiv 2503.14476, Eq. 11).

    Example:
        >>> from drpo.credit.advantages import mean
        >>> group_credit([], advantage=mean)
        []
    """
    compared = [g for g in groups if len(g.episodes) >= 2 and not (drop_equal and teaches_nothing(g, advantage))]
    if advantage is gdpo:
        return _trained(groups, _decoupled(compared))
    credits = [c for group in compared for c in _compared(group, advantage, discount)]
    return _trained(groups, _whitened(credits) if whiten else credits)


def teaches_nothing(group: ScoredGroup, advantage: Advantage) -> bool:
    """Whether the task's rewards of a group give no advantage: all are equal, for `gdpo` those of each part.

    Args:
        group: a scored group; penalties of its tokens do not count.
        advantage: rewards of a group -> advantages.
    """
    if advantage is not gdpo or len(group.episodes) < 2:
        return group.equal_rewards
    return not gdpo(*weighted_parts(group.results, penalties=False)).any()


def weighted_parts(results: Sequence[RewardResult], penalties: bool = True) -> tuple[Tensor, Tensor]:
    """Return what the rewards of a group's n episodes are the weighted sum of.

    Args:
        results: the rewards.
        penalties: whether those of tokens count.

    Returns:
        Parts [K, n] and weights [K], float64: the parts with a weight (`RewardResult.weights`), 0 where an episode has
        none; and, where there is any, what they leave of the whole reward (all of it without weights; rewards of an
        environment's turns), with the weight 1.

    Example:
        >>> result = RewardResult(1.5, {"right": 1.0, "short": 1.0}, weights={"right": 1.0, "short": 0.5})
        >>> weighted_parts([result, RewardResult(0.0)])
        (tensor([[1., 0.],
                [1., 0.]], dtype=torch.float64), tensor([1.0000, 0.5000], dtype=torch.float64))
    """
    weights = {name: weight for result in results for name, weight in result.weights.items()}
    rows = [[result.parts.get(name, 0.0) for result in results] for name in weights]
    parts = torch.tensor(rows, dtype=torch.float64).reshape(len(weights), len(results))
    factors = torch.tensor(list(weights.values()), dtype=torch.float64)
    whole = [result.whole + (sum(result.penalties) if penalties else 0.0) for result in results]
    sizes = factors[:, None] * parts
    rest = torch.tensor(whole, dtype=torch.float64) - sizes.sum(0)
    rest = torch.where(rest.abs() <= SAME * sizes.abs().sum(0), 0, rest)  # rounding
    if weights and not rest.any():
        return parts, factors
    return torch.cat([parts, rest[None]]), torch.cat([factors, factors.new_ones(1)])


def _decoupled(groups: Sequence[ScoredGroup]) -> list[Credit]:
    """Return the credit that `gdpo` gives the episodes of a rollout."""
    if not groups:
        return []
    advantages = [gdpo(*weighted_parts(group.results)) for group in groups]
    scale = torch.cat(advantages).double().square().mean().sqrt()
    scaled = [(a.double() / scale).float() if scale else a for a in advantages]
    return [
        Credit(s, a.expand(s.n_sampled))
        for group, of_group in zip(groups, scaled, strict=True)
        for e, a in zip(group.episodes, of_group, strict=True)
        for s in e.sequences
    ]


def _whitened(credits: Sequence[Credit]) -> list[Credit]:
    """Return the credit of all sequences, whitened together."""
    if not credits:
        return []
    advantage = whitened(torch.cat([credit.advantage for credit in credits]))
    parts = advantage.split([len(credit.advantage) for credit in credits])
    return [replace(credit, advantage=part) for credit, part in zip(credits, parts, strict=True)]


def _trained(groups: Sequence[ScoredGroup], credits: Sequence[Credit]) -> list[Credit]:
    """Return the credit of the episodes that are not masked."""
    masked = {s for group in groups for e in group.masked for s in e.sequences}
    return [credit for credit in credits if credit.sequence not in masked]


def _compared(group: ScoredGroup, advantage: Advantage, discount: float) -> list[Credit]:
    by_token = any(r.penalties or any(isinstance(turn, tuple) for turn in r.turns) for r in group.results)
    lengths = [e.turns if by_token else (1,) * len(e.turns) for e in group.episodes]
    rewards = [turn_rewards(result, n) for result, n in zip(group.results, lengths, strict=True)]
    advantages = step_advantages(rewards, advantage, discount)
    return [credit for e, a in zip(group.episodes, advantages, strict=True) for credit in _by_turn(e, a)]


def _by_turn(episode: Episode, advantages: Sequence[Tensor]) -> list[Credit]:
    """Return the credit of an episode's sequences from one advantage per turn or per token of a turn."""
    by_token = torch.cat([a.expand(n) for a, n in zip(advantages, episode.turns, strict=True)])
    by_sequence = by_token.split([s.n_sampled for s in episode.sequences])
    return list(starmap(Credit, zip(episode.sequences, by_sequence, strict=True)))


def turn_rewards(result: RewardResult, lengths: Sequence[int]) -> list[Tensor]:
    """Return the reward of each step of each turn, [K_t] float32; a turn's single number is its last step's.

    The episode's total is added to the very last step, its penalties to the steps, which are then tokens.

    Args:
        result: an episode's reward.
        lengths: K_t of each turn, >= 1: its sampled tokens, or 1 where no turn has rewards per token.

    Example:
        >>> turn_rewards(RewardResult(1.0), [1, 1]), turn_rewards(RewardResult(1.0, turns=(0.25, (0.5, 0.0))), [1, 2])
        ([tensor([0.]), tensor([1.])], [tensor([0.2500]), tensor([0.5000, 1.0000])])
    """
    turns = result.turns or (0.0,) * len(lengths)
    steps = [
        turn if isinstance(turn, tuple) else (*(0.0,) * (n - 1), turn) for turn, n in zip(turns, lengths, strict=True)
    ]
    rewards = [torch.tensor(turn, dtype=torch.float32) for turn in steps]
    if result.penalties:
        rewards = [r + p for r, p in zip(rewards, torch.tensor(result.penalties).split(list(lengths)), strict=True)]
    rewards[-1][-1] += result.total
    return rewards


def step_advantages(
    rewards: Sequence[Sequence[Tensor]], advantage: Advantage, discount: float = 1.0
) -> list[list[Tensor]]:
    """Return the advantage of every step of the turns of one group's episodes.

        R_{t,k} = sum_{l >= k} r_{t,l} + discount R_{t+1,0},    A_{i,t,k} = advantage(R_{1,t',k'}, .., R_{G,t',k'})_i

    with t' = min(t, T_j - 1) and k' = min(k, K_{j,t'} - 1): a shorter episode or turn is compared by the return of its
    last step. With a single reward at the end and discount 1, every step has the outcome's advantage, bit for bit.

    Args:
        rewards: [K_{i,t}] float32 for each turn of each of the G episodes, K >= 1; the reward of each step (a whole
            turn, or each of its tokens), reward units.
        advantage: rewards of a group -> advantages.
        discount: factor per turn, (0, 1]; steps within a turn are not discounted.

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
        at_turn = [r[min(t, len(r) - 1)] for r in returns]
        longest = max(map(len, at_turn))
        steps = torch.stack([torch.cat([r, r[-1:].expand(longest - len(r))]) for r in at_turn], dim=1)
        compared = _per_step(advantage, steps)
        for i, r in enumerate(returns):
            if t < len(r):
                turns[i].append(compared[: len(r[t]), i])
    return turns


def _per_step(advantage: Advantage, steps: Tensor) -> Tensor:
    """Return the advantages [K, G] of K steps; a user's own function compares one group at a time."""
    if advantage in REGISTRY.entries.values():
        return advantage(steps)
    return torch.stack([advantage(step) for step in steps])


def _returns(rewards: Sequence[Tensor], discount: float) -> list[Tensor]:
    """Return each turn's discounted sums of later rewards, [K_t] float32, computed in float64."""
    following = torch.zeros((), dtype=torch.float64)
    returns: list[Tensor] = []
    for reward in reversed(rewards):
        returns.append(reward.double().flip(0).cumsum(0).flip(0) + discount * following)
        following = returns[-1][0]
    return [r.float() for r in reversed(returns)]


def gae_credit(groups: Sequence[ScoredGroup], values: Sequence[Tensor] | None, *, critic: GAE) -> list[Credit]:
    """Return credit by GAE from the critic's values; a turn's single reward is its last token's.

    `critic.whiten` whitens the advantages of the whole rollout together.

    Args:
        groups: the groups of a rollout; groups of one episode are allowed.
        values: [M] for each sequence, in order; the value of each token's context, reward units.
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
    return _trained(groups, list(starmap(Credit, zip(sequences, *columns, strict=True))))
