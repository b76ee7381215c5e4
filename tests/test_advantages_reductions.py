"""Advantages of a group and weights of a batch, against exact fractions."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from drpo import reductions
from drpo.credit import advantages
from drpo.errors import InputError
from drpo.reductions import Horizon, sequence_mean, token_mean
from drpo.spec import format_spec, parse_spec

# ---------------------------------------------------------------------------------------------------------- advantages


def exact(name: str, rewards: list[float]) -> list[float]:
    """The definition of an advantage, in fractions."""
    r = [Fraction(x) for x in rewards]
    n, centre = len(r), sum(r, Fraction(0)) / len(r)
    variance = sum((x - centre) ** 2 for x in r) / (n - 1)
    return {
        "mean": lambda: [float(x - centre) for x in r],
        "zscore": lambda: [float(x - centre) / math.sqrt(variance) if variance else 0.0 for x in r],
        "rloo": lambda: [float(x - (sum(r, Fraction(0)) - x) / (n - 1)) for x in r],
        "maxrl": lambda: [float((x - centre) / centre) if centre > 0 else 0.0 for x in r],
        "reward": lambda: rewards,
    }[name]()


NAMES = ["mean", "zscore", "rloo", "maxrl"]
each_advantage = pytest.mark.parametrize("name", NAMES)
each_and_reward = pytest.mark.parametrize("name", [*NAMES, "reward"])
scores = st.integers(-64, 64).map(lambda k: k / 16)
groups = st.lists(scores, min_size=2, max_size=12)


def usable(name: str, rewards: list[float]) -> list[float]:
    """The same, without the negative ones that maxrl refuses."""
    return [abs(r) for r in rewards] if name == "maxrl" else rewards


def advantage(name: str, rewards: list[float]) -> Tensor:
    return parse_spec(name, advantages.REGISTRY)(torch.tensor(rewards, dtype=torch.float32))


@each_and_reward
@given(rewards=groups)
def test_advantage_is_its_definition(name: str, rewards: list[float]) -> None:
    rewards = usable(name, rewards)
    got = advantage(name, rewards)
    assert got.dtype == torch.float32
    assert got.shape == (len(rewards),)
    assert got.tolist() == pytest.approx(exact(name, rewards), rel=1e-6, abs=1e-6)


@each_advantage
def test_golden_advantages(name: str) -> None:
    """One success in four, in each method's own units."""
    third = 1 / 3
    want = {"mean": (0.75, -0.25), "zscore": (1.5, -0.5), "rloo": (1.0, -third), "maxrl": (3.0, -1.0)}[name]
    assert advantage(name, [1.0, 0.0, 0.0, 0.0]).tolist() == pytest.approx([want[0], *[want[1]] * 3], rel=1e-6)


@each_advantage
@given(reward=st.one_of(st.just(0.95), st.floats(-1e6, 1e6, width=32)), n=st.integers(2, 33))
def test_constant_group_has_exactly_zero_advantage(name: str, reward: float, n: int) -> None:
    """Not merely small: zscore would divide rounding noise by rounding noise."""
    assert (advantage(name, usable(name, [reward] * n)) == 0).all()


@each_advantage
def test_eight_times_095_is_exactly_zero_and_one_failure_spares_no_row(name: str) -> None:
    assert torch.equal(advantage(name, [0.95] * 8), torch.zeros(8))
    mixed = advantage(name, [0.0] + [0.95] * 7)
    assert (mixed[1:] > 0).all()
    assert mixed[0] < 0


@each_and_reward
@given(rewards=groups, data=st.data())
def test_advantage_follows_the_order_of_the_group(name: str, rewards: list[float], data: st.DataObject) -> None:
    rewards = usable(name, rewards)
    order = data.draw(st.permutations(range(len(rewards))))
    shuffled = advantage(name, [rewards[i] for i in order])
    assert torch.allclose(shuffled, advantage(name, rewards)[list(order)], rtol=1e-6, atol=1e-7)


@each_advantage
@given(rewards=groups, scale=st.sampled_from([0.25, 1.0, 8.0]), offset=st.sampled_from([-3.0, 0.0, 5.0]))
def test_units_of_each_advantage(name: str, rewards: list[float], scale: float, offset: float) -> None:
    """An offset changes nothing but maxrl; a scale is kept by mean and rloo, and divided out by zscore and maxrl."""
    rewards = usable(name, rewards)
    assume(len(set(rewards)) > 1)
    base, scaled = advantage(name, rewards), advantage(name, [scale * r for r in rewards])
    assert torch.allclose(scaled, base * (scale if name in ("mean", "rloo") else 1), rtol=1e-5, atol=1e-6)
    if name != "maxrl":
        assert torch.allclose(advantage(name, [r + offset for r in rewards]), base, rtol=1e-5, atol=1e-6)
    assert abs(base.sum()) <= 1e-5 * base.abs().sum()


def test_maxrl_is_zero_without_a_success_and_refuses_what_is_no_rate_of_success() -> None:
    assert (advantage("maxrl", [0.0, 0.0, 0.0]) == 0).all()
    with pytest.raises(InputError, match="none may be negative"):
        advantage("maxrl", [-1.0, 1.5])


@each_and_reward
@pytest.mark.parametrize("n_samples", [2, 3, 8, 33, 130])
def test_many_groups_at_once_have_the_advantages_of_each_alone(name: str, n_samples: int) -> None:
    """Bit for bit; among them groups of equal rewards, and of rewards that differ by rounding."""
    draw = torch.Generator().manual_seed(n_samples)
    different = torch.rand(20, n_samples, generator=draw)
    groups = torch.cat([different, different.round(), torch.full((1, n_samples), 0.1), 5 + 1e-7 * different])
    function = parse_spec(name, advantages.REGISTRY)
    assert torch.equal(function(groups), torch.stack([function(group) for group in groups]))


@each_and_reward
def test_a_group_of_one_is_refused_with_what_to_change(name: str) -> None:
    for rewards in ([1.0], []):
        with pytest.raises(InputError, match="samples"):
            advantage(name, rewards)


@each_and_reward
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reward_that_is_no_number_is_refused(name: str, bad: float) -> None:
    with pytest.raises(InputError, match="finite"):
        advantage(name, [0.0, bad, 1.0])


@each_advantage
def test_advantage_leaves_the_rewards_alone(name: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5])
    parse_spec(name, advantages.REGISTRY)(rewards)
    assert torch.equal(rewards, torch.tensor([1.0, 0.0, 0.5]))
    assert rewards._version == 0


@each_and_reward
def test_advantage_spec_round_trip(name: str) -> None:
    assert format_spec(parse_spec(name, advantages.REGISTRY), advantages.REGISTRY) == name
    assert parse_spec(name, advantages.REGISTRY) is getattr(advantages, name)


@pytest.mark.parametrize(("text", "message"), [("z_score", "did you mean 'zscore'"), ("mean(2)", "takes no arguments")])
def test_unknown_advantage_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_spec(text, advantages.REGISTRY)


# ---------------------------------------------------------------------------------------------------------- reductions

Reduction = Callable[[Tensor, Tensor], Tensor]
each_reduction = pytest.mark.parametrize(
    "weigh", [token_mean, sequence_mean, Horizon(9)], ids=["token_mean", "sequence_mean", "horizon"]
)
rows = st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=24)


def batch(tokens: list[tuple[bool, int]]) -> tuple[Tensor, Tensor]:
    """keep and sequence; the numbers of the sequences are neither dense nor small."""
    return torch.tensor([k for k, _ in tokens]), torch.tensor([7 * s + 3 for _, s in tokens])


def exact_weights(weigh: Reduction, tokens: list[tuple[bool, int]]) -> list[float]:
    kept = [s for k, s in tokens if k]
    n, n_sequences = len(kept), len(set(kept))
    divisor = {
        token_mean: lambda s: n,
        sequence_mean: lambda s: n_sequences * kept.count(s),
        Horizon(9): lambda s: n_sequences * 9,
    }[weigh]
    return [1 / divisor(s) if k else 0.0 for k, s in tokens]


@each_reduction
@given(tokens=rows)
def test_weight_is_its_definition(weigh: Reduction, tokens: list[tuple[bool, int]]) -> None:
    got = weigh(*batch(tokens))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(exact_weights(weigh, tokens), rel=1e-6, abs=0)


@each_reduction
def test_golden_weights(weigh: Reduction) -> None:
    """Two sequences of 3 and 1 kept tokens; a third has none and counts for nothing."""
    keep = torch.tensor([True, True, False, True, True, False, False])
    sequence = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    want = {
        token_mean: [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 0, 0],
        sequence_mean: [1 / 6, 1 / 6, 0, 1 / 6, 1 / 2, 0, 0],
        Horizon(9): [1 / 18, 1 / 18, 0, 1 / 18, 1 / 18, 0, 0],
    }[weigh]
    assert weigh(keep, sequence).tolist() == pytest.approx(want, rel=1e-6)


@given(tokens=rows)
def test_means_sum_to_one(tokens: list[tuple[bool, int]]) -> None:
    keep, sequence = batch(tokens)
    assume(keep.any())
    for weigh in (token_mean, sequence_mean):
        assert weigh(keep, sequence).sum().item() == pytest.approx(1, rel=1e-6)
    shares = sequence_mean(keep, sequence)
    for s in sequence[keep].unique():
        assert shares[sequence == s].sum().item() == pytest.approx(1 / len(sequence[keep].unique()), rel=1e-6)


@each_reduction
@given(tokens=rows, more=st.lists(st.integers(0, 9), max_size=6), data=st.data())
def test_masked_tokens_and_order_change_no_weight(
    weigh: Reduction, tokens: list[tuple[bool, int]], more: list[int], data: st.DataObject
) -> None:
    padded = tokens + [(False, s) for s in more]
    order = data.draw(st.permutations(range(len(padded))))
    shuffled = weigh(*batch([padded[i] for i in order]))
    want = torch.cat([weigh(*batch(tokens)), torch.zeros(len(more))])
    assert torch.equal(shuffled, want[list(order)])


@each_reduction
def test_nothing_kept_weighs_nothing(weigh: Reduction) -> None:
    for n in (0, 3):
        assert torch.equal(weigh(torch.zeros(n).bool(), torch.arange(n)), torch.zeros(n))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "9"])
def test_horizon_is_a_positive_whole_number(wrong: object) -> None:
    with pytest.raises(InputError, match="horizon"):
        Horizon(wrong)  # type: ignore[arg-type]


@each_reduction
def test_reduction_spec_round_trip(weigh: Reduction) -> None:
    assert parse_spec(format_spec(weigh, reductions.REGISTRY), reductions.REGISTRY) == weigh


def test_reduction_specs() -> None:
    assert parse_spec("token_mean", reductions.REGISTRY) is token_mean
    assert parse_spec("sequence_mean", reductions.REGISTRY) is sequence_mean
    assert parse_spec("horizon(8192)", reductions.REGISTRY) == Horizon(8192) == Horizon(tokens=8192)
    with pytest.raises(InputError, match="did you mean 'horizon'"):
        parse_spec("horizn(3)", reductions.REGISTRY)
