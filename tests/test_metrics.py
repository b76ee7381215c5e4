"""Every recorded figure against a NumPy oracle written from its description, and pass@k and Wilson's interval.

Not covered: what is written to files (train/log.py), and the gradient weights of objectives beyond those whose formula
the oracle knows (test_objectives.py has them all).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp
from torch import Tensor

from drpo.errors import InputError
from drpo.live.step_table import result
from drpo.model import loading
from drpo.objectives import (
    DPPO,
    DRPO,
    GSPO,
    REGISTRY,
    ImportanceSampling,
    Objective,
    PPOClip,
    TokenLoss,
    borders,
    caution,
    out_of_region,
    radii,
)
from drpo.ops import Head, SampledTokens, linear_policy_loss
from drpo.report.panels import drawn_lines
from drpo.rewards import RewardConfig, Scored
from drpo.rollout import ScriptedEngine
from drpo.spec import parse_spec
from drpo.train.evaluate import difference_interval, examine, mean_interval, pass_at_k, summed_up, wilson
from drpo.train.log import rollout_records
from drpo.train.metric_tables import REGION_METRICS, ROLLOUT_METRICS, TOKEN_METRICS, UPDATE_METRICS
from drpo.train.metrics import rollout_metrics, step_metrics, token_metrics
from drpo.types import (
    Failure,
    Problem,
    RewardResult,
    Sampling,
    ScoredGroup,
    StepStats,
    Tokens,
    TokenStats,
    Transcript,
    Unscored,
)
from support.rollouts import Prompted
from support.tiny_world import completion, with_sequence
from support.token_stats import stats_of_tokens
from support.worlds import tiny_run

# ---- tokens ----


def drpo_weight(a: np.ndarray, pi: np.ndarray, mu: np.ndarray) -> np.ndarray:
    return np.where(a == 0, 1, 1 - np.sign(a) * (pi - mu) / 0.2)


def ppo_weight(a: np.ndarray, pi: np.ndarray, mu: np.ndarray) -> np.ndarray:
    r = pi / mu
    return np.where((a > 0) & (r > 1.28) | (a < 0) & (r < 0.8), 0.0, 1.0)


def plain_weight(a: np.ndarray, pi: np.ndarray, mu: np.ndarray) -> np.ndarray:
    return np.ones_like(a)


OBJECTIVES: dict[str, tuple[Objective, Callable[..., np.ndarray]]] = {
    "drpo": (DRPO(0.2), drpo_weight),
    "ppo": (PPOClip(0.2, 0.28), ppo_weight),
    "none": (ImportanceSampling(), plain_weight),
}


def random_tokens(n: int, seed: int) -> tuple[Tokens, Tensor]:
    """Tokens from likely to very unlikely, some far off-policy, some not kept and then full of rubbish."""
    generator = torch.Generator().manual_seed(seed)
    behavior_logp = -4 * torch.rand(n, generator=generator) ** 2 - 1e-3
    logp = (behavior_logp + 0.5 * torch.randn(n, generator=generator)).clamp(max=-1e-4)
    advantage = torch.randn(n, generator=generator) * (torch.rand(n, generator=generator) > 0.2)
    keep = torch.rand(n, generator=generator) > 0.3
    entropy = 3 * torch.rand(n, generator=generator)
    rubbish = [torch.nan, torch.inf, -torch.inf, 1e30]
    for column in (logp, behavior_logp, advantage, entropy):
        column[~keep] = torch.tensor(rubbish)[torch.randint(4, (int((~keep).sum()),), generator=generator)]
    return Tokens(logp, behavior_logp, advantage, keep, torch.arange(n) // 7), entropy


def oracle(weight: Callable[..., np.ndarray], tokens: Tokens, entropy: Tensor) -> dict[str, float]:
    keep = tokens.keep.numpy()
    logp, behavior_logp, a, h = (
        x.double().numpy()[keep] for x in (tokens.logp, tokens.behavior_logp, tokens.advantage, entropy)
    )
    pi, mu = np.exp(logp), np.exp(behavior_logp)
    moved, r = np.abs(pi - mu), np.exp(np.minimum(logp - behavior_logp, 20))
    w = weight(a, pi, mu)
    return {
        "entropy": h.mean(),
        "prob_diff_mean": moved.mean(),
        "prob_diff_p99": np.quantile(moved, 0.99),
        "masked": (w <= 0).mean(),
        "weight_min": w.min(),
        "weight_mean": w.mean(),
        "weight_max": w.max(),
        "ratio_mean": r.mean(),
        "ratio_max": r.max(),
        "scaled_weight_max": np.abs(r * w).max(),
        "ratio_capped": (logp - behavior_logp > 20).sum(),
        "k3": (r - 1 - (logp - behavior_logp)).mean(),
        "trained_tokens": keep.sum(),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [1, 6, 1000])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_token_figures_are_the_oracles(name: str, n: int, seed: int) -> None:
    objective, weight = OBJECTIVES[name]
    tokens, entropy = random_tokens(n, seed)
    if not tokens.keep.any():
        assert token_metrics(objective, stats_of_tokens(objective, tokens, entropy)) == {"trained_tokens": 0}
        return
    found = token_metrics(objective, stats_of_tokens(objective, tokens, entropy))
    wanted = oracle(weight, tokens, entropy)
    assert found.keys() - REGION_METRICS.keys() == wanted.keys() == TOKEN_METRICS.keys()
    for figure, value in wanted.items():
        assert found[figure] == pytest.approx(value, rel=2e-5, abs=2e-6), figure
    if n == 1000:  # the tokens are such that no figure is 0 or 1 by accident
        assert (0.02 < found["masked"] < 0.98) == (name != "none")


def test_ratios_beyond_the_cap_are_counted() -> None:
    logp = torch.tensor([-1.0, -1.0, -1.0, -30.0])
    behavior_logp = torch.tensor([-20.5, -21.5, -40.0, -1.0])
    tokens = Tokens(logp, behavior_logp, torch.ones(4), torch.ones(4, dtype=torch.bool), torch.zeros(4).long())
    found = token_metrics(ImportanceSampling(), stats_of_tokens(ImportanceSampling(), tokens, torch.zeros(4)))
    assert found["ratio_capped"] == 2
    assert found["ratio_max"] == pytest.approx(math.exp(20))
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tokens_that_are_not_kept_count_nowhere(name: str) -> None:
    objective, _ = OBJECTIVES[name]
    tokens, entropy = random_tokens(500, 0)
    shorter = Tokens(**{k: v[tokens.keep] for k, v in vars(tokens).items() if v is not None})
    assert token_metrics(objective, stats_of_tokens(objective, tokens, entropy)) == token_metrics(
        objective, stats_of_tokens(objective, shorter, entropy[tokens.keep])
    )


SIDES = {
    "drpo(0.2)": lambda mu, pi: (pi - mu < -0.2, pi - mu > 0.2),
    "drpo(0.2, power=0.5)": lambda mu, pi: ((pi - mu) < -0.2 * mu**0.5, (pi - mu) > 0.2 * mu**0.5),
    "dppo(0.1, 0.3)": lambda mu, pi: (pi - mu < -0.1, pi - mu > 0.3),
    "mask(0.15)": lambda mu, pi: (pi - mu < -0.15, pi - mu > 0.15),
    "ppo(0.2, 0.28)": lambda mu, pi: (pi / mu < 0.8, pi / mu > 1.28),
    "cispo(0.2, 0.28)": lambda mu, pi: (pi / mu < 0.8, pi / mu > 1.28),
    "spo(0.3)": lambda mu, pi: (pi / mu < 0.7, pi / mu > 1.3),
}


@pytest.mark.parametrize("text", SIDES)
def test_both_sides_of_a_region_are_counted_and_are_where_its_borders_are(text: str) -> None:
    objective = parse_spec(text, REGISTRY)
    tokens, entropy = random_tokens(1000, 0)
    found = token_metrics(objective, stats_of_tokens(objective, tokens, entropy))
    pi, mu = (x.double().exp()[tokens.keep].numpy() for x in (tokens.logp, tokens.behavior_logp))
    low, high = SIDES[text](mu, pi)
    assert 0.01 < low.mean() < 0.99 and 0.01 < high.mean() < 0.99
    for name, side in (("out_of_region", low | high), ("out_of_region_low", low), ("out_of_region_high", high)):
        assert found[name] == pytest.approx(side.mean(), abs=2e-3)
    at = borders(objective, torch.from_numpy(mu))
    assert at is not None
    assert (np.nan_to_num(at[0].numpy(), nan=-1) > pi).mean() == pytest.approx(low.mean(), abs=2e-3)
    assert (np.nan_to_num(at[1].numpy(), nan=2) < pi).mean() == pytest.approx(high.mean(), abs=2e-3)


def test_what_says_nothing_of_a_region_has_no_such_figures() -> None:
    tokens, entropy = random_tokens(50, 0)
    for text in ("none", "sapo", "penalty('k3', 0.1)"):
        objective = parse_spec(text, REGISTRY)
        assert not REGION_METRICS.keys() & token_metrics(objective, stats_of_tokens(objective, tokens, entropy)).keys()
        assert out_of_region(objective, tokens) is borders(objective, torch.ones(1)) is radii(objective) is None
        assert caution(objective) is None


def test_a_sequence_leaves_its_region_as_a_whole_and_a_divergence_by_its_own_measure() -> None:
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    tokens = Tokens(
        logp, logp - torch.tensor([1.0, 0.0, 0.1, 0.0]), torch.ones(4), torch.ones(4).bool(), torch.tensor([0, 0, 1, 1])
    )
    assert GSPO(0.2, 0.28).out_of_region(tokens).tolist() == [True, True, False, False]
    moved = replace(tokens, divergence=torch.tensor([0.1, 0.2, 0.1, 0.3]))
    assert DPPO(0.15, 0.25, "topk_tv").out_of_region(moved).tolist() == [False, True, False, True]
    assert (caution(DPPO(1.0, divergence="topk_tv")) is None, caution(DPPO(9.0, divergence="topk_kl"))) == (False, None)


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("drpo(0.2)", (0.2, 0.2)),
        ("dppo(0.1, 0.3)", (0.1, 0.3)),
        ("drpo(12.5)", None),
        ("dppo(0.05, divergence='kl')", None),
        ("ppo(0.2, 0.28)", None),
        ("drpo(0.2, power=0.5)", None),
        ("gspo", None),
    ],
)
def test_radii_are_there_where_they_are_shifts_of_probability(text: str, sides: tuple[float, float] | None) -> None:
    assert radii(parse_spec(text, REGISTRY)) == sides


@dataclass
class Counted:
    """An objective with a metric that counts how often it is evaluated."""

    tokenwise: bool
    calls: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        self.calls += 1
        return TokenLoss(-tokens.advantage * tokens.logp, {"mine": tokens.behavior_logp.exp()})


@pytest.mark.parametrize("tokenwise", [True, False])
def test_an_objective_is_evaluated_once(tokenwise: bool) -> None:
    objective, one = Counted(tokenwise), torch.ones(3)
    sampled = SampledTokens(torch.arange(3), -one, one, one.bool(), torch.arange(3), one)
    hidden = torch.randn(3, 4).requires_grad_()
    found = linear_policy_loss(hidden, Head(torch.randn(5, 4)), sampled, objective)
    found.loss.backward()
    tokens = Tokens(found.logp, -one, one, one.bool(), torch.arange(3))
    stats = StepStats(TokenStats(tokens, found.entropy, found.gradient, found.metrics), tokens.sequence, 0.0, 1.0, 1e-3)
    record = step_metrics(3, some_groups(), [stats, stats], objective)
    assert objective.calls == 1
    assert record["mine"] == pytest.approx(math.exp(-1))
    assert record["weight_mean"] == pytest.approx(float((-found.gradient / (found.logp + 1).exp() / -1).mean().abs()))


# ---- a step ----


def stats_of(objective: Objective, tokens: Tokens, entropy: Tensor, at: slice, i: int) -> StepStats:
    part = Tokens(**{k: v[at] for k, v in vars(tokens).items() if v is not None})
    if len(part.sequence):  # each update numbers its own completions from 0
        part = replace(part, sequence=part.sequence - part.sequence[0])
    seen = stats_of_tokens(objective, part, entropy[at])
    return StepStats(
        seen, part.sequence, loss=0.1 * i - 0.2, grad_norm=(3.0, 5.0, 1.0)[i % 3], learning_rate=1e-3 / (i + 1)
    )


def some_groups() -> list[ScoredGroup]:
    """Of 3, 1, 2, 0 and 4 marked completions; lengths from 1 to 10; failures and abstentions."""
    made = [[completion([1] * (i + n + 1), problem=f"p{i}", sample=n) for n in range(4)] for i in range(5)]
    made = [
        [with_sequence(c, version=torch.full((i + n + 1,), (4 * i + n) % 3 % 2)) for n, c in enumerate(row)]
        for i, row in enumerate(made)
    ]
    stopped = {(0, 0), (0, 2), (2, 3), (3, 1), (4, 0), (4, 1), (4, 2)}
    made = [
        [replace(c, finish_reason="stop") if (i, n) in stopped else c for n, c in enumerate(row)]
        for i, row in enumerate(made)
    ]
    rewards = [[1.0, 0.0, 0.5], [1.0], [-0.5, 0.0], [], [1.0, 1.5, 1.0, 2.0]]
    raised, late, odd = Failure("raised", "no"), Failure("timed_out", "late"), Failure("not_a_number", "[1]")
    failures = [[raised], [None, late, None], [None, raised], [raised, odd, raised, raised], []]
    return [
        ScoredGroup(
            Problem.of_text(f"p{i}", "", "12" if i == 0 else ""),
            tuple(made[i][: len(rewards[i])]),
            tuple(map(RewardResult, rewards[i])),
            tuple(Unscored(c, f) for c, f in zip(made[i][len(rewards[i]) :], failures[i], strict=True)),
        )
        for i in range(5)
    ]


def test_rollout_figures_are_the_oracles() -> None:
    groups = some_groups()
    found = rollout_metrics(3, groups)
    rewards = np.array([1.0, 0.0, 0.5, 1.0, -0.5, 0.0, 1.0, 1.5, 1.0, 2.0])
    lengths = np.array([[i + n + 1 for n in range(4)] for i in range(5)])
    stopped = np.zeros((5, 4), dtype=bool)
    stopped[[0, 0, 2, 3, 4, 4, 4], [0, 2, 3, 1, 0, 1, 2]] = True
    wanted = {
        "reward_mean": rewards.mean(),
        "reward_std": rewards.std(),
        "groups_all_correct": 2 / 4,  # p1 and p4, of the four groups with a mark
        "groups_all_wrong": 1 / 4,  # p2
        "frac_reward_zero_std": 1 / 4,  # p1
        "no_number": 1.0,  # of p0's, whose texts are empty
        "length_terminated": lengths[stopped].mean(),
        "length_truncated": lengths[~stopped].mean(),
        "truncated": (~stopped).mean(),
        "sampled_tokens": lengths.sum(),
        "staleness": np.mean([2 - i % 3 % 2 for i in range(20)]),  # the third step, of versions 0 and 1
        "staleness_max": 2,
        "reward_failed": 7,
        "reward_raised": 5,
        "reward_timed_out": 1,
        "reward_died": 0,
        "reward_not_finite": 0,
        "reward_not_a_number": 1,
        "reward_abstained": 3,
    }
    assert found.keys() == wanted.keys() == ROLLOUT_METRICS.keys()
    for figure, value in wanted.items():
        assert found[figure] == pytest.approx(value), figure
    means = [float(g.rewards.mean()) for g in groups if len(g.rewards)]
    assert found["reward_mean"] != pytest.approx(sum(means) / len(means), abs=0.01)  # a mean of means would differ


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_length_of_none_is_absent(finish_reason: str) -> None:
    groups = [replace(g, unscored=()) for g in some_groups()]
    groups = [replace(g, episodes=tuple(replace(e, finish_reason=finish_reason) for e in g.episodes)) for g in groups]
    found = rollout_metrics(3, groups)
    assert ("length_terminated" in found) == (finish_reason == "stop")
    assert ("length_truncated" in found) == (finish_reason == "length")
    assert found["truncated"] == (finish_reason == "length")


def test_the_order_of_groups_does_not_matter() -> None:
    groups = some_groups()
    found = rollout_metrics(3, groups)
    for figure, value in rollout_metrics(3, groups[::-1]).items():
        assert value == pytest.approx(found[figure], rel=1e-12)


def test_parts_of_the_reward_are_figures_over_the_episodes_that_have_them() -> None:
    first, *rest = some_groups()
    parts: list[dict[str, float]] = [{"right": 1.0, "short": 0.5}, {"right": 0.0}, {}]
    results = tuple(RewardResult(r.total, part) for r, part in zip(first.results, parts, strict=True))
    with_parts = [replace(first, results=results), *rest]
    found = rollout_metrics(3, with_parts)
    assert found == rollout_metrics(3, [first, *rest]) | {"reward_parts/right": 0.5, "reward_parts/short": 0.5}
    records = list(rollout_records(3, with_parts, {}))
    assert [r.get("reward_parts") for r in records[:3]] == [*parts[:2], None]
    held_out = summed_up(with_parts, 3, step=3)
    assert held_out.reward_parts == {"right": 0.5, "short": 0.5}
    assert result(held_out).endswith("; right 0.5; short 0.5") and "; right" not in result(summed_up(rest, 3, step=3))
    drawn = drawn_lines(tiny_run(), [{"step": 3, **found}], [json.loads(json.dumps(asdict(held_out)))])
    parts_drawn = {panel.title: lines for panel, lines, _ in drawn if "Parts" in panel.title}
    assert parts_drawn.keys() == {"Parts of the reward", "Parts of the held-out reward"}
    for lines in parts_drawn.values():
        assert [(line.name, line.y) for line in lines] == [("right", [0.5]), ("short", [0.5])]


CUTS = {"one": (0, 700), "uneven": (0, 500, 690, 700), "a part without kept tokens": (0, 300, 300, 700)}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_steps_figures_do_not_depend_on_its_updates(name: str, cut: str) -> None:
    """Each over all tokens of all updates at once, though the updates differ in size; and each update's own besides."""
    objective, weight = OBJECTIVES[name]
    tokens, entropy = random_tokens(700, 1)
    wide = torch.arange(700) > 500
    tokens = replace(tokens, logp=torch.where(wide & tokens.keep, tokens.logp - 1, tokens.logp))  # parts differ in kind
    edges = CUTS[cut]
    stats = [stats_of(objective, tokens, entropy, slice(a, b), i) for i, (a, b) in enumerate(pairwise(edges))]
    record = step_metrics(3, some_groups(), stats, objective)
    wanted = oracle(weight, tokens, entropy)
    for figure, value in wanted.items():
        assert record[figure] == pytest.approx(value, rel=2e-5, abs=2e-6), figure
    assert {k: record[k] for k in ROLLOUT_METRICS} == rollout_metrics(3, some_groups())
    assert record["loss"] == stats[-1].loss
    assert record["learning_rate"] == stats[-1].learning_rate
    assert record["grad_norm"] == max(s.grad_norm for s in stats)
    updates = record.get("updates", [])
    assert len(updates) == (len(stats) if len(stats) > 1 else 0)
    for one, s in zip(updates, stats, strict=False):
        own = token_metrics(objective, s.token_stats)
        assert one == own | {"loss": s.loss, "grad_norm": s.grad_norm, "learning_rate": s.learning_rate}
    if cut == "uneven":
        means = [one["prob_diff_mean"] for one in updates]
        assert record["prob_diff_mean"] != pytest.approx(sum(means) / len(means), rel=0.01)


@pytest.mark.parametrize("objective", [DRPO(0.2), GSPO(0.2, 0.2)], ids=["drpo", "gspo"])
def test_a_steps_figures_are_its_updates_put_together(objective: Objective) -> None:
    """Also where a token's weight depends on its completion, and completion 0 of one update is not that of the next."""
    tokens, entropy = random_tokens(700, 1)
    tokens = replace(tokens, advantage=(tokens.sequence % 3 - 1).float())
    edges = (0, 70, 560, 700)
    stats = [stats_of(objective, tokens, entropy, slice(a, b), i) for i, (a, b) in enumerate(pairwise(edges))]
    record = step_metrics(3, some_groups(), stats, objective)
    updates = record["updates"]
    share = np.array([u["trained_tokens"] for u in updates]) / record["trained_tokens"]
    for figure in ("entropy", "prob_diff_mean", "out_of_region", "masked", "weight_mean", "ratio_mean", "k3"):
        assert record[figure] == pytest.approx(sum(share * [u[figure] for u in updates]), rel=1e-6), figure
    for figure in ("weight_max", "ratio_max", "scaled_weight_max"):
        assert record[figure] == max(u[figure] for u in updates), figure
    assert record["weight_min"] == min(u["weight_min"] for u in updates)


def test_a_step_without_updates_has_the_rollouts_figures_alone() -> None:
    record = step_metrics(3, some_groups(), [], DRPO(0.2))
    assert record == rollout_metrics(3, some_groups())


def test_every_figure_is_described() -> None:
    tokens, entropy = random_tokens(100, 2)
    record = step_metrics(3, some_groups(), [stats_of(DPPO(0.15), tokens, entropy, slice(0, 100), 0)], DPPO(0.15))
    described = ROLLOUT_METRICS.keys() | TOKEN_METRICS.keys() | REGION_METRICS.keys() | UPDATE_METRICS.keys()
    assert record.keys() == described - {"skipped_updates"}
    skipped = replace(stats_of(DPPO(0.15), tokens, entropy, slice(0, 100), 0), taken=False)
    assert step_metrics(3, some_groups(), [skipped], DPPO(0.15)).keys() == ROLLOUT_METRICS.keys() | {"skipped_updates"}


# ---- pass@k and the interval ----


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_one_right_of_four_passes_at_four() -> None:
    assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    biased = 1 - (1 - 1 / 4) ** 4
    assert biased < 0.7  # what drawing with replacement would say


@pytest.mark.parametrize("k", [0, -1, 5])
def test_pass_at_k_beyond_the_samples(k: int) -> None:
    with pytest.raises(InputError, match=rf"k={k} must be in \[1, n=4\]"):
        pass_at_k(4, 1, k)


@given(n=st.integers(1, 2000), share=st.floats(0, 1), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_is_scipys(n: int, share: float, level: float) -> None:
    right = round(share * n)
    wanted = binomtest(right, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(right / n, n, level) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


@pytest.mark.parametrize("mean", [-0.1, 1.1, math.nan])
def test_no_interval_outside_zero_to_one(mean: float) -> None:
    assert all(math.isnan(x) for x in wilson(mean, 10))


def share_that_holds(interval: tuple[np.ndarray, np.ndarray], truth: float) -> tuple[float, float]:
    """How often simulated intervals hold the truth, and four standard errors of that."""
    low, high = interval
    held = (low - 1e-12 <= truth) & (truth <= high + 1e-12)
    return float(held.mean()), 4 * math.sqrt(0.95 * 0.05 / len(held))


CHANCES = {  # of a problem to be answered right: how to draw them, and their mean
    "half": (lambda generator, shape: np.full(shape, 0.5), 0.5),
    "beta(2, 2)": (lambda generator, shape: generator.beta(2, 2, shape), 0.5),
    "beta(.5, .5)": (lambda generator, shape: generator.beta(0.5, 0.5, shape), 0.5),
    "beta(.2, 2)": (lambda generator, shape: generator.beta(0.2, 2, shape), 0.2 / 2.2),
}


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize("distribution", CHANCES)
def test_the_interval_of_several_samples_a_problem_holds_the_mean_in_95_of_100_cases(distribution: str, k: int) -> None:
    """And it is not wider than it takes: Wilson's over the problems would hold it in 99 to 100 of 100."""
    chances, mean = CHANCES[distribution]
    generator = np.random.default_rng(0)
    for n in (30, 100):
        means = generator.binomial(k, chances(generator, (3000, n))) / k
        share, error = share_that_holds(mean_interval(means, most=n * k), mean)
        assert 0.95 - 0.01 - error < share < 0.95 + 0.02 + error, n


def test_with_one_sample_a_problem_the_interval_is_wilsons() -> None:
    rights = np.random.default_rng(0).binomial(1, 0.3, (50, 40)).astype(float)
    for row, low, high in zip(rights, *mean_interval(rights, most=40), strict=True):
        assert (low, high) == pytest.approx(wilson(row.mean(), 40))


@given(
    means=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=40),
    flip=st.booleans(),
)
def test_the_interval_lies_within_wilsons_and_around_the_mean(means: list[float], flip: bool) -> None:
    values = 1 - np.array(means) if flip else np.array(means)
    low, high = mean_interval(values, most=4 * len(values))
    outer_low, outer_high = wilson(float(values.mean()), len(values))
    assert outer_low - 1e-12 <= low <= values.mean() + 1e-12 and values.mean() - 1e-12 <= high <= outer_high + 1e-12
    assert high - low > 0


@pytest.mark.parametrize("scores", [0.0, 1.0])
def test_where_all_answers_are_alike_more_samples_of_a_problem_prove_no_more(scores: float) -> None:
    low, high = mean_interval(np.full(10, scores), most=160)
    assert (low, high) == pytest.approx(wilson(scores, 10))


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_interval_of_a_paired_difference_holds_it(k: int) -> None:
    """With random numbers of their own; shared ones only make the two evaluations more alike."""
    generator = np.random.default_rng(1)
    for n in (30, 100):
        before = generator.beta(0.5, 0.5, (3000, n))
        after = before + 0.3 * (1 - before)
        difference = generator.binomial(k, after) / k - generator.binomial(k, before) / k
        share, error = share_that_holds(difference_interval(difference, k), 0.15)
        assert 0.95 - 0.01 - error < share < 0.95 + 0.03 + error, n


def test_no_change_in_a_few_problems_is_not_certain_and_one_without_bounds_has_no_interval() -> None:
    low, high = difference_interval(np.zeros(10), n_samples=1)
    assert low < -0.2 and high > 0.2
    assert all(np.isnan(difference_interval(np.full(10, 3.5), n_samples=None)))
    wanted = ttest_1samp([-3.0, 4.0, 1.0, 2.0, 6.5], 0).confidence_interval(0.95)
    low, high = difference_interval(np.array([-3.0, 4.0, 1.0, 2.0, 6.5]), n_samples=None)
    assert (low, high) == pytest.approx((wanted.low, wanted.high))  # values of light tails: n - 1 degrees of freedom


# ---- an evaluation ----


class StubPool:
    """Marks by a table: (problem id, sample) -> score; None abstains."""

    def __init__(self, scores: dict[tuple[str, int], float | None]) -> None:
        self.scores = scores
        self.config = RewardConfig()

    def score(self, items: list[tuple[Problem, Transcript]]) -> list[Scored]:
        scores = [self.scores[p.id, int(transcript.text)] for p, transcript in items]
        return [Scored(None if score is None else RewardResult(score), None, 0.0) for score in scores]


def evaluated(table: dict[str, list[float | None]], before=None):  # type: ignore[no-untyped-def]
    _, tokenizer = loading.tiny()
    driver = Prompted(ScriptedEngine(tokenizer, script=lambda r: str(r.key[-1])), loading.tiny()[0]).driver
    scores = {(name, i): value for name, row in table.items() for i, value in enumerate(row)}
    problems = [Problem.of_text(name, name, "") for name in table]
    sampling = Sampling(samples=len(next(iter(table.values()))), max_new_tokens=2)
    groups = examine(driver, problems, sampling, StubPool(scores), seed=0)  # type: ignore[arg-type]
    return summed_up(groups, sampling.samples, step=3, before=before)


def test_evaluation_weighs_problems_alike_and_counts_right_answers() -> None:
    found = evaluated(
        {
            "a": [1.0, 0.0, 0.0, 0.0],
            "b": [0.5, 0.5, 0.999, 0.0],  # partial scores are not right
            "c": [1.0, None, None, None],
            "d": [None, None, None, None],
            "e": [0.0, 1.0, None, 0.0],
        }
    )
    means = [0.25, 1.999 / 4, 1.0, 1 / 3]
    assert found.reward_mean == pytest.approx(sum(means) / 4)
    assert (found.n_problems, found.n_samples, found.failed, found.step) == (4, 4, 8, 3)
    assert found.problem_means == pytest.approx(dict(zip("abce", means, strict=True)))
    low, high = mean_interval(np.array(means), most=16 / (1 / 4 + 1 / 4 + 1 + 1 / 3))
    assert (found.low, found.high) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert found.difference is found.difference_low is None
    assert found.pass_at.keys() == {1, 2, 4}
    assert found.pass_at[1] == pytest.approx((1 / 4 + 0 + 1 + 1 / 3) / 4)
    assert found.pass_at[2] == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)  # "c" has one mark and says nothing of two
    assert found.pass_at[4] == pytest.approx((1 + 0) / 2)
    assert (found.mean_length, found.truncated) == (2.0, 0.0)


@pytest.mark.parametrize("scores", [(-1.0, 1.0), (0.0, 1.5), (-0.7, -0.9)])
def test_scores_that_leave_0_to_1_have_a_mean_and_no_interval(scores: tuple[float, float]) -> None:
    found = evaluated({"a": [scores[0]], "b": [scores[1]]})
    assert found.reward_mean == pytest.approx(sum(scores) / 2)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_an_evaluation_is_compared_with_another_problem_by_problem() -> None:
    table = {"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 0.0], "d": [None, None], "e": [1.0, 0.0]}
    before = {"a": 0.5, "b": 0.5, "c": 0.0, "d": 1.0, "z": 1.0}  # "e" is new, "d" has no mark now, "z" is gone
    found = evaluated(table, before)
    assert found.difference == pytest.approx(0.5 / 3)
    low, high = difference_interval(np.array([0.5, 0.0, 0.0]), n_samples=2)
    assert (found.difference_low, found.difference_high) == (pytest.approx(float(low)), pytest.approx(float(high)))
    assert "; +16.7 points from step 0 (paired, 95 % interval " in result(found)
    assert evaluated(table, {"z": 1.0}).difference is None
    negative = evaluated({"a": [-1.0, -1.0], "b": [-3.0, -1.0]}, {"a": -2.0, "b": -2.0})
    assert (negative.difference, negative.difference_low) == (0.5, pytest.approx(0.5 - 0.5 * 12.7062, abs=1e-3))
    assert math.isnan(negative.low) and "; +0.5 from step 0 (paired" in result(negative)


def test_an_evaluation_needs_problems() -> None:
    driver = Prompted(ScriptedEngine(loading.tiny()[1], lambda r: ""), loading.tiny()[0]).driver
    with pytest.raises(InputError, match="no held-out problems"):
        examine(driver, [], Sampling(), StubPool({}), seed=0)  # type: ignore[arg-type]


def test_an_evaluation_without_a_single_mark_is_refused() -> None:
    with pytest.raises(InputError, match="abstained"):
        evaluated({"a": [None, None], "b": [None, None]})
