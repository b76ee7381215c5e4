"""Credit before batching: what each token of a rollout is credited with, from the definition of its rule.

Not covered: a critic's values (test_critic.py) and the functions of a group's rewards (test_advantages_reductions.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from drpo.credit import advantages, credit_rule, gae_credit, group_credit
from drpo.credit.gae import GAE
from drpo.credit.rules import step_advantages
from drpo.errors import InputError
from drpo.types import Credit, Episode, Problem, RewardResult, ScoredGroup
from support.tiny_world import completion, grouped

RULES = (advantages.mean, advantages.zscore, advantages.rloo)
REWARDS = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=6)


@given(rewards=REWARDS, lengths=st.lists(st.integers(1, 5), min_size=6, max_size=6), rule=st.sampled_from(RULES))
def test_a_final_reward_credits_every_token_with_the_outcome(
    rewards: list[float], lengths: list[int], rule: Callable[[Tensor], Tensor]
):
    """Bit for bit, also where the episode has several steps."""
    rollout = [completion(range(1, n + 1), sample=i) for i, n in enumerate(lengths[: len(rewards)])]
    (group,) = grouped(rollout, [rewards])
    outcome = rule(torch.tensor(rewards))
    turns = [[*torch.zeros(n - 1, 1), torch.tensor([r])] for n, r in zip(lengths, rewards, strict=False)]
    tokens = [[torch.cat(turn)] for turn in turns]
    steps = zip(step_advantages(turns, rule), step_advantages(tokens, rule), strict=True)
    for credit, (in_turns, in_tokens), c, a in zip(
        credit_rule(rule)([group], None), steps, rollout, outcome, strict=True
    ):
        assert credit.sequence is c.sequence and credit.value is None and credit.returns is None
        assert torch.equal(credit.advantage, a.expand(len(c.sequence.token_ids)))
        assert torch.equal(torch.cat(in_turns), credit.advantage) and torch.equal(in_tokens[0], credit.advantage)


TURN = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=3)


@given(
    rewards=st.lists(st.lists(TURN, min_size=1, max_size=3), min_size=2, max_size=4),
    discount=st.floats(0.1, 1),
)
def test_rewards_of_steps_are_compared_as_the_definition_says(rewards: list[list[list[float]]], discount: float):
    """R_{t,k} = sum_{l >= k} r_{t,l} + discount R_{t+1,0}, less the group's mean at that turn and step, or the last."""

    def to_go(episode: list[list[float]], t: int, k: int) -> float:
        t = min(t, len(episode) - 1)
        k = min(k, len(episode[t]) - 1)
        return sum(episode[t][k:]) + sum(discount ** (u - t) * sum(episode[u]) for u in range(t + 1, len(episode)))

    found = step_advantages([[torch.tensor(turn) for turn in r] for r in rewards], advantages.mean, discount)
    for episode, advantage in zip(rewards, found, strict=True):
        for t, turn in enumerate(episode):
            baselines = [sum(to_go(e, t, k) for e in rewards) / len(rewards) for k in range(len(turn))]
            wanted = [to_go(episode, t, k) - baselines[k] for k in range(len(turn))]
            torch.testing.assert_close(advantage[t], torch.tensor(wanted), rtol=1e-5, atol=1e-4)


def test_a_users_own_advantage_receives_one_group_at_a_time():
    def doubled(rewards: Tensor) -> Tensor:
        assert rewards.shape == (2,)
        return 2 * advantages.mean(rewards)

    rewards = [[torch.tensor([1.0, 0.0, 3.0])], [torch.tensor([2.0])]]
    found, half = step_advantages(rewards, doubled), step_advantages(rewards, advantages.mean)
    assert all(torch.equal(a, 2 * b) for (a,), (b,) in zip(found, half, strict=True))


def test_groups_with_nothing_to_compare_have_no_credit_unless_there_is_a_critic():
    rollout = [completion([1, 2], problem="alone"), *(completion([3], problem="two", sample=i) for i in range(2))]
    groups = grouped(rollout, [[1.0], [0.0, 1.0]])
    assert [c.sequence for c in group_credit(groups, advantage=advantages.mean)] == [e.sequence for e in rollout[1:]]
    values = [torch.zeros(2), torch.zeros(1), torch.zeros(1)]
    with_critic = gae_credit(groups, values, critic=GAE(lam=1.0, whiten=False))
    assert [c.sequence for c in with_critic] == [e.sequence for e in rollout]
    assert [c.advantage.tolist() for c in with_critic] == [[1.0, 1.0], [0.0], [1.0]]
    assert group_credit([], advantage=advantages.mean) == gae_credit([], [], critic=GAE()) == []


def test_credit_has_one_number_for_each_token():
    with pytest.raises(InputError, match=r"credit\.advantage \[2\]: must be \[3\], one for each token"):
        Credit(completion([1, 2, 3]).sequence, torch.zeros(2))
    with pytest.raises(InputError, match=r"credit\.returns \[1\]: must be \[3\]"):
        Credit(completion([1, 2, 3]).sequence, torch.zeros(3), torch.zeros(3), torch.zeros(1))


def of_turns(turns: Sequence[int], sample: int) -> Episode:
    """An episode that branches after its first turn, where it has more."""
    lengths = [turns[0], sum(turns[1:])] if len(turns) > 1 else turns
    sequences = tuple(completion(range(1, n + 1)).sequence for n in lengths)
    return replace(completion([1], sample=sample), turns=tuple(turns), sequences=sequences)


TURNS = [(2, 1, 3), (4,), (1, 2)]
RESULTS = [RewardResult(1.0, turns=(0.5, -0.25, 0.0)), RewardResult(2.0), RewardResult(0.0, {"seen": 1.0}, (0.0, 3.0))]


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_rewards_of_turns_are_credited_to_the_turns_before_them(discount: float):
    """Every token of a turn has the turn's advantage, in whichever of the episode's sequences it is."""
    group = ScoredGroup(
        Problem.of_text("p", "", ""), tuple(of_turns(n, i) for i, n in enumerate(TURNS)), tuple(RESULTS)
    )
    rewards = [list(torch.tensor(r).split(1)) for r in ([0.5, -0.25, 1.0], [2.0], [0.0, 3.0])]
    wanted = step_advantages(rewards, advantages.mean, discount)
    credits = iter(credit_rule(advantages.mean, discount=discount)([group], None))
    for episode, n_tokens, advantage in zip(group.episodes, TURNS, wanted, strict=True):
        found = [next(credits) for _ in episode.sequences]
        assert [c.sequence for c in found] == list(episode.sequences)
        by_token = [float(a) for a, n in zip(advantage, n_tokens, strict=True) for _ in range(n)]
        assert torch.cat([c.advantage for c in found]).tolist() == by_token
    assert next(credits, None) is None


def test_an_episode_that_branched_is_not_taken_for_one_sequence():
    with pytest.raises(InputError, match=r"episode 3 of problem 'p' has 2 sequences of tokens; only episodes of one"):
        _ = of_turns((2, 1), 3).sequence


def test_a_critic_reads_a_turns_reward_at_its_last_token():
    group = ScoredGroup(
        Problem.of_text("p", "", ""), (of_turns((2, 1, 2), 0),), (RewardResult(1.0, turns=(0.5, 0.0, 4.0)),)
    )
    credits = gae_credit([group], [torch.zeros(2), torch.zeros(3)], critic=GAE(lam=1.0, whiten=False))
    assert [c.returns.tolist() for c in credits] == [[5.5, 5.5], [5.0, 5.0, 5.0]]


def test_rewards_of_tokens_are_credited_to_the_tokens_before_them():
    """Beside turns that have one number, and an episode that has none."""
    results = (RewardResult(1.0, turns=(0.5, (2.0,), (0.0, 4.0, 0.0))), RewardResult(2.0), RewardResult(0.0))
    group = ScoredGroup(Problem.of_text("p", "", ""), tuple(of_turns(n, i) for i, n in enumerate(TURNS)), results)
    found = [c.advantage for c in credit_rule(advantages.mean)([group], None)]
    to_go = [[7.5, 7.5], [7.0, 5.0, 5.0, 1.0], [2.0] * 4, [0.0], [0.0, 0.0]]
    sums = [[9.5, 9.5], [9.0, 7.0, 7.0, 3.0], [9.5] * 4, [9.5], [9.0, 9.0]]  # of the group
    for advantage, r, m in zip(found, to_go, sums, strict=True):
        torch.testing.assert_close(advantage, torch.tensor(r) - torch.tensor(m) / 3)
    values = [torch.zeros(len(a)) for a in found]
    with_critic = gae_credit([group], values, critic=GAE(lam=1.0, whiten=False))
    assert [c.returns.tolist() for c in with_critic] == to_go
