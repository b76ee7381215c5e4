"""From completions to gradients: the tokens that were sampled are trained, once, against the mu that was reported.

Not covered: real weights, GPUs, several processes, the objectives' own formulas (test_objectives.py), and rewards that
run in other processes (test_rewards.py).
"""

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from drpo import objectives, reductions
from drpo.batch import pack, split_micro_batch
from drpo.errors import InputError
from drpo.model.head import HeadShape
from drpo.model.policy import Policy
from drpo.objectives import DRPO, GSPO, M2PO, TOPR, Decoupled, ImportanceSampling, PPOClip, RefKL, Reinforce, ratio
from drpo.reductions import Horizon
from drpo.rewards import RewardConfig, Scored
from drpo.spec import parse_spec
from drpo.train.logp_pass import LogpPass
from drpo.train.optim import AdamW
from drpo.train.score import require_scored, score
from drpo.train.step import update_policy
from drpo.types import (
    Episode,
    Failure,
    MicroBatch,
    Problem,
    RewardResult,
    Sampling,
    ScoredGroup,
    Transcript,
)
from support.rollouts import transformers_engine
from support.tiny_world import (
    PROBLEMS,
    REWARDS,
    STOPS,
    batched,
    by_sequence,
    completion,
    distribution,
    doubled,
    grouped,
    how,
    own_logp,
    perturb,
    sampled,
    sees,
    tiny,
)
from support.updates import Cramped, close, equal, gradients, policy_of

pytestmark = pytest.mark.filterwarnings("ignore:.*CPU autocast.*:UserWarning")

REDUCTIONS = {"token_mean": reductions.token_mean, "sequence_mean": reductions.sequence_mean, "horizon": Horizon(20)}


@pytest.fixture(scope="module")
def rollout() -> list[Episode]:
    return sampled(*tiny(STOPS))


@pytest.fixture
def groups(rollout: list[Episode]) -> list[ScoredGroup]:
    return grouped(rollout, REWARDS)


# ---- the tokens that are trained ----


@given(data=st.data())
def test_trained_ids_are_the_sampled_ids(data: st.DataObject) -> None:
    """Any ids: specials in the middle, the padding id at the end, byte sequences that no text encodes to."""
    ids = st.integers(0, 260)
    prompts = data.draw(st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=4))
    completions = [
        completion(
            data.draw(st.lists(ids, min_size=1, max_size=9)),
            prompt_ids=data.draw(st.sampled_from(prompts)),
            problem=f"p{g}",
            sample=i,
        )
        for g in range(data.draw(st.integers(1, 3)))
        for i in range(data.draw(st.integers(2, 4)))
    ]
    n_groups = len({c.problem_id for c in completions})
    sizes = Counter(c.problem_id for c in completions)
    groups = grouped(completions, [[float(i) for i in range(sizes[f"p{g}"])] for g in range(n_groups)])
    budget = data.draw(st.integers(1, 60))
    (batch,) = batched(groups, how(micro_batch_tokens=budget))
    micros = batch.micro_batches
    columns = {name: torch.cat([getattr(m, name) for m in micros]) for name in ("target", "behavior_logp", "weight")}
    parts = {name: by_sequence(micros, column) for name, column in columns.items()}
    assert sorted(parts["target"]) == list(range(len(completions)))
    for i, c in enumerate(completions):
        assert torch.equal(parts["target"][i], c.sequence.token_ids)
        assert torch.equal(parts["behavior_logp"][i], c.sequence.behavior_logp)
        assert (parts["weight"][i] > 0).all()
    assert batch.n_episodes == len(completions)
    assert batch.n_tokens == sum(len(c.sequence.token_ids) for c in completions)
    for m in micros:
        assert m.layout.n_positions == len(m.input_ids)
        assert m.layout.n_positions <= budget or len(m.sequence.unique()) == 1
        for s in m.sequence.unique():
            whole = torch.cat([completions[s].sequence.prompt_ids, completions[s].sequence.token_ids])
            # Each token is predicted from the one before, which saw all that stands before it, at its position.
            for i, position in enumerate(
                m.position[m.sequence == s].tolist(), start=len(completions[s].sequence.prompt_ids)
            ):
                seen = sees(m.layout, position)
                assert torch.equal(m.input_ids[seen], whole[:i])
                assert m.layout.positions()[seen].tolist() == list(range(i))


def test_nothing_is_encoded_again_after_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny(STOPS)
    completions = sampled(model, tokenizer)
    assert any(tokenizer(c.text)["input_ids"] != c.sequence.token_ids.tolist() for c in completions)  # it would show

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("text was encoded again")

    for name in ("__call__", "encode", "encode_plus", "_encode_plus", "tokenize", "convert_tokens_to_ids"):
        monkeypatch.setattr(type(tokenizer), name, refuse, raising=False)
    groups = score(PROBLEMS, in_groups(PROBLEMS, completions), StubPool(lambda problem, text: float(len(text) % 2)))
    policy = policy_of(model)
    seen = []
    for batch in batched(groups, how(updates=2)):
        _, stats = gradients(policy, batch)
        seen.append(len(stats.tokens.logp))
    assert sum(seen) == sum(len(c.sequence.token_ids) for c in completions)


@pytest.mark.parametrize("temperature", [0.6, 1.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_logp_and_entropy_are_the_plain_models(rollout: list[Episode], temperature: float) -> None:
    """Each token's log-probability, aligned, at the sampling temperature; and its whole distribution's entropy."""
    model, _ = tiny(STOPS)
    policy = policy_of(model, temperature=temperature)
    (batch,) = batched(grouped(rollout, REWARDS), how())
    _, stats = gradients(policy, batch)
    logp = by_sequence(batch.micro_batches, stats.tokens.logp)
    entropy = by_sequence(batch.micro_batches, stats.entropy)
    for i, c in enumerate(rollout):
        torch.testing.assert_close(logp[i], own_logp(model, c, temperature), rtol=0, atol=1e-5)
        z = distribution(model, c, temperature).double()
        torch.testing.assert_close(entropy[i].double(), -(z.exp() * z).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.0, marks=pytest.mark.slow), 1.5])
def test_on_policy_the_ratio_is_one(temperature: float) -> None:
    model, tokenizer = tiny(STOPS)
    completions = sampled(model, tokenizer, temperature=temperature)
    (batch,) = batched(grouped(completions, REWARDS), how())
    _, stats = gradients(policy_of(model, temperature=temperature), batch)
    assert (ratio(stats.tokens) - 1).abs().max() < 1e-5


def test_with_and_without_its_gradient_it_is_the_same_distribution(rollout: list[Episode]) -> None:
    """What the fused loss reports, and what additive terms and reference models are made of."""
    policy = policy_of(tiny(STOPS)[0], temperature=0.6)
    (batch,) = batched(grouped(rollout, REWARDS), how(micro_batch_tokens=10_000))
    (micro,) = batch.micro_batches
    wanted = policy(micro)
    found = policy.loss(micro, DRPO(0.2))
    torch.testing.assert_close(found.logp, wanted[0].detach())
    torch.testing.assert_close(found.entropy, wanted[1].detach())


def test_a_policy_shares_prompts_where_it_can(rollout: list[Episode]) -> None:
    """The positions that go through the model: every prompt once, and each answer without its last token."""
    policy = policy_of(tiny(STOPS)[0])
    assert policy.shares_prompts
    (batch,) = batched(grouped(rollout, REWARDS), how(micro_batch_tokens=10_000))
    prompts = sum(len(p) for p in {tuple(c.sequence.prompt_ids.tolist()) for c in rollout})
    assert batch.micro_batches[0].layout.n_positions == prompts + sum(len(c.sequence.token_ids) - 1 for c in rollout)


def test_prompts_that_are_not_shared_count_in_the_budget(rollout: list[Episode]) -> None:
    groups = grouped(rollout, REWARDS)
    (batch,) = batched(groups, how(micro_batch_tokens=163, share_prompts=False))
    for micro in batch.micro_batches:
        assert set(micro.layout.prefix) == {-1}
        assert sum(micro.layout.length) <= 163
    shared, alone = policy_of(tiny(STOPS)[0]), policy_of(tiny(STOPS)[0])
    wanted, _ = gradients(shared, batched(groups, how())[0])
    close(gradients(alone, batch)[0], wanted, 2e-5)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, initializer_range=0.2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures_train_their_own_distribution(
    family: str, groups: list[ScoredGroup], rollout: list[Episode]
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    (batch,) = batched(groups, how())
    _, stats = gradients(policy_of(model), batch)
    logp = by_sequence(batch.micro_batches, stats.tokens.logp)
    for i, c in enumerate(rollout):
        torch.testing.assert_close(logp[i], own_logp(model, c, 1.0), rtol=0, atol=1e-5)


def test_the_gradient_is_the_plain_models(groups: list[ScoredGroup], rollout: list[Episode]) -> None:
    """Prompts and padding add nothing to it: -sum A r / (S H) over the sampled tokens, by autograd, row by row."""
    model, _ = tiny(STOPS)
    model.double()
    (batch,) = batched(groups, how())
    policy = policy_of(copy.deepcopy(model), dtype=torch.float64)
    found, stats = gradients(policy, batch, ImportanceSampling())
    loss = torch.zeros((), dtype=torch.float64)
    advantage = [r - sum(rs) / 4 for rs in REWARDS for r in rs]
    for c, a in zip(rollout, advantage, strict=True):
        ids = torch.cat([c.sequence.prompt_ids, c.sequence.token_ids])
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)[len(c.sequence.prompt_ids) - 1 : -1]
        chosen = logp.gather(-1, c.sequence.token_ids[:, None])[:, 0]
        loss = loss - (a * torch.exp(chosen - c.sequence.behavior_logp)).sum() / (16 * 20)
    loss.backward()
    close(found, {name: p.grad for name, p in model.named_parameters()}, 1e-6)  # advantages and weights are float32
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)


# ---- micro-batches and neighbours ----

OF_THE_BATCH = parse_spec(
    "reinforce*weight('token', 1.01, normalize=True)*reject('seq_mean_k2', 0.001) + 0.5*kl_cov(0.2) + cppo(0.01)",
    objectives.REGISTRY,
)
"""Statistics of the batch, of sequences, and of positions, all in one."""


@pytest.mark.parametrize(
    ("objective", "dtype", "tolerance", "reduction"),
    [
        (DRPO(0.2), torch.float64, 1e-10, "horizon"),
        (PPOClip(), torch.float64, 1e-10, "sequence_mean"),
        (GSPO(), torch.float64, 1e-10, "token_mean"),
        (M2PO(1e-3), torch.float64, 1e-10, "token_mean"),
        (OF_THE_BATCH, torch.float64, 1e-10, "sequence_mean"),
        pytest.param(DRPO(0.2), torch.float64, 1e-10, "token_mean", marks=pytest.mark.slow),
        pytest.param(DRPO(0.2), torch.float32, 2e-5, "horizon", marks=pytest.mark.slow),
    ],
    ids=["drpo", "ppo sequence_mean", "gspo token_mean", "m2po", "of the batch", "drpo token_mean", "drpo float32"],
)
def test_any_micro_batches_give_the_same_update(
    objective: object, dtype: torch.dtype, tolerance: float, reduction: str, groups: list[ScoredGroup]
) -> None:
    model, _ = tiny(STOPS)
    model = perturb(model, 0.02)
    policy = policy_of(doubled(model) if dtype == torch.float64 else model, dtype=dtype)
    row_by_row = how(micro_batch_tokens=1, reduction=REDUCTIONS[reduction])
    (alone,) = batched(groups, row_by_row)
    assert all(len(m.sequence.unique()) == 1 for m in alone.micro_batches)
    wanted, stats = gradients(policy, alone, objective)
    logp = by_sequence(alone.micro_batches, stats.tokens.logp)
    shapes = set()
    for budget in (60, 163, 10_000):
        (batch,) = batched(groups, replace(row_by_row, micro_batch_tokens=budget))
        shapes.add(tuple(m.layout for m in batch.micro_batches))
        found, other = gradients(policy, batch, objective)
        close(found, wanted, tolerance)
        assert other.loss == pytest.approx(stats.loss, abs=tolerance)
        assert other.grad_norm == pytest.approx(stats.grad_norm, rel=tolerance)
        for i, values in by_sequence(batch.micro_batches, other.tokens.logp).items():
            torch.testing.assert_close(values, logp[i], rtol=0, atol=tolerance)
    assert len(shapes) == 3


def assert_column(groups: list[ScoredGroup], column: str, policy: Policy, rollout: list[Episode]) -> None:
    """Every sequence has the model's own log-probabilities in a column."""
    sequences = [s for g in groups for e in g.episodes for s in e.sequences]
    for s, c in zip(sequences, rollout, strict=True):
        torch.testing.assert_close(getattr(s, column), own_logp(policy.model, c, 1.0), rtol=0, atol=1e-5)


def test_the_proximal_policy_is_the_policy_before_the_updates(
    groups: list[ScoredGroup], rollout: list[Episode]
) -> None:
    """In every sequence its own log-probabilities; held to them the first update has the ratio 1: REINFORCE."""
    model, _ = tiny(STOPS)
    policy = policy_of(perturb(model, 0.02))
    anchored = LogpPass("proximal_logp", policy, 163).add_to(groups)
    assert_column(anchored, "proximal_logp", policy, rollout)
    (batch,) = batched(anchored, how(micro_batch_tokens=163))
    found, _ = gradients(policy, batch, Decoupled(PPOClip()))
    close(found, gradients(policy, batch, Reinforce())[0], 1e-5)
    with pytest.raises(InputError, match="proximal_logp is missing"):
        gradients(policy, batched(groups, how())[0], Decoupled(PPOClip()))


def test_a_reference_model_is_followed_as_an_advantage(groups: list[ScoredGroup], rollout: list[Episode]) -> None:
    """RefKL's gradient is REINFORCE's with l_ref - l for the advantage, where the policy is the sampler."""
    policy, teacher = policy_of(tiny(STOPS)[0]), policy_of(perturb(tiny(STOPS)[0], 0.02))
    taught = LogpPass("reference_logp", teacher, 163).add_to(groups)
    assert_column(taught, "reference_logp", teacher, rollout)
    (batch,) = batched(taught, how(micro_batch_tokens=163))
    found, _ = gradients(policy, batch, RefKL())
    apart = [replace(m, advantage=m.reference_logp - m.behavior_logp) for m in batch.micro_batches]
    close(found, gradients(policy, replace(batch, micro_batches=tuple(apart)), Reinforce())[0], 1e-5)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3
    with pytest.raises(InputError, match="reference_logp is missing"):
        gradients(policy, batched(groups, how())[0], RefKL())


def test_every_token_has_the_reward_of_its_episode(groups: list[ScoredGroup]) -> None:
    """However the batch is split, and split again; by it TOPR tells successes from failures."""
    policy, seen = policy_of(tiny(STOPS)[0]), set()
    whole = [replace(g, results=tuple(RewardResult(int(2 * r.total)) for r in g.results)) for g in groups]  # no floats
    assert {m.score.dtype for m in batched(whole, how())[0].micro_batches if m.score is not None} == {torch.float32}
    rewards = {s: r for g in groups for e, r in zip(g.episodes, g.rewards.tolist(), strict=True) for s in e.sequences}
    for budget in (60, 163, 10_000):
        (batch,) = batched(groups, how(micro_batch_tokens=budget))
        for micro in batch.micro_batches:
            for part in (micro, *split_micro_batch(micro, batch.credits, 40, share_prompts=True)):
                assert part.score is not None
                assert part.score.tolist() == [rewards[batch.credits[i].sequence] for i in part.row.tolist()]
                seen |= set(part.score.tolist())
    assert len(seen) > 1
    doubled = [replace(m, advantage=m.advantage * (1 + (m.score > 0).float())) for m in batch.micro_batches]
    by_hand, _ = gradients(policy, replace(batch, micro_batches=tuple(doubled)), Reinforce())
    close(gradients(policy, batch, TOPR(positive=2.0))[0], by_hand, 1e-5)  # on-policy: the ratios are 1
    assert pack([s for g in groups for s in g.sequences], 10_000).micro_batches[0].score is None


def test_a_normaliser_of_each_micro_batchs_own_would_show(groups: list[ScoredGroup]) -> None:
    """The negative control of the test above: weights made anew in each micro-batch give another gradient."""
    model, _ = tiny(STOPS)
    policy = policy_of(perturb(model, 0.02))
    (batch,) = batched(groups, how(micro_batch_tokens=163, reduction=reductions.token_mean))
    own = [
        replace(m, weight=reductions.token_mean(torch.ones_like(m.target, dtype=torch.bool), m.sequence))
        for m in batch.micro_batches
    ]
    wanted, _ = gradients(policy, batch)
    found, _ = gradients(policy, replace(batch, micro_batches=tuple(own)))
    with pytest.raises(AssertionError):
        close(found, wanted, 0.01)


def mixed_micro_batch(groups: list[ScoredGroup]) -> MicroBatch:
    (batch,) = batched(groups, how(micro_batch_tokens=10_000))
    (micro,) = batch.micro_batches
    assert len(micro.sequence.unique()) == 16
    assert max(micro.layout.prefix) > 0  # prompts are shared
    return micro


def logp_and_gradient(policy: Policy, micro: MicroBatch, s: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities of one completion, and the gradient of their sum."""
    logp, _ = policy(micro)
    mine = logp[micro.sequence == s]
    (slope,) = torch.autograd.grad(mine.sum(), policy.model.get_parameter("model.layers.0.self_attn.k_proj.weight"))
    return mine.detach(), slope


@pytest.mark.parametrize("s", [pytest.param(0, marks=pytest.mark.slow), 7, pytest.param(15, marks=pytest.mark.slow)])
def test_a_neighbours_tokens_change_nothing(groups: list[ScoredGroup], s: int) -> None:
    policy = policy_of(tiny(STOPS)[0])
    micro = mixed_micro_batch(groups)
    wanted = logp_and_gradient(policy, micro, s)
    mine = torch.zeros(len(micro.input_ids), dtype=torch.bool)
    mine[sees(micro.layout, int(micro.position[micro.sequence == s][-1]))] = True
    noise = torch.randint(257, micro.input_ids.shape, generator=torch.Generator().manual_seed(0))
    scrambled = torch.where(mine, micro.input_ids, noise)
    for one, other in zip(wanted, logp_and_gradient(policy, replace(micro, input_ids=scrambled), s), strict=True):
        assert torch.equal(one, other)
    scrambled[mine.nonzero()[0]] += 1  # its own tokens do matter
    assert not torch.equal(wanted[0], logp_and_gradient(policy, replace(micro, input_ids=scrambled), s)[0])


# ---- updates, weights, skipping ----


@pytest.mark.parametrize(("n_groups", "updates"), [(4, 1), (4, 2), (4, 4), (3, 2), (4, 3), (7, 4), (9, 4), (5, 5)])
def test_each_group_is_in_one_update_and_each_update_has_its_share(n_groups: int, updates: int) -> None:
    completions = [completion([g + 1, i + 1], problem=f"p{g}", sample=i) for g in range(n_groups) for i in range(2)]
    batches = batched(grouped(completions, [[0.0, 1.0]] * n_groups), how(updates=updates))
    assert len(batches) == updates
    firsts = [sorted({int(t) - 1 for m in b.micro_batches for t in m.target[0::2]}) for b in batches]
    assert [g for part in firsts for g in part] == list(range(n_groups))
    assert max(map(len, firsts)) - min(map(len, firsts)) <= 1


def test_no_groups_make_no_batches() -> None:
    assert batched([], how(updates=2)) == []


def test_groups_with_nothing_to_compare_are_dropped_and_count_nowhere(groups: list[ScoredGroup]) -> None:
    lonely = replace(groups[1], episodes=groups[1].episodes[:1], results=groups[1].results[:1])
    empty = replace(groups[0], episodes=(), results=())
    (with_them,) = batched([lonely, groups[0], empty, groups[2]], how())
    (without,) = batched([groups[0], groups[2]], how())
    assert (with_them.n_episodes, with_them.n_tokens) == (without.n_episodes, without.n_tokens)
    for one, other in zip(with_them.micro_batches, without.micro_batches, strict=True):
        assert one.layout == other.layout
        for name in ("input_ids", "position", "target", "behavior_logp", "advantage", "weight"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert len(batched([lonely, groups[0]], how(updates=2))) == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("budget", [1, 163, 10_000])
def test_weights_sum_to_what_the_reduction_says(reduction: str, budget: int, groups: list[ScoredGroup]) -> None:
    (batch,) = batched(groups, how(reduction=REDUCTIONS[reduction], micro_batch_tokens=budget))
    weight = torch.cat([m.weight for m in batch.micro_batches]).double()
    expected = batch.n_tokens / (batch.n_episodes * 20) if reduction == "horizon" else 1.0
    assert float(weight.sum()) == pytest.approx(expected, rel=1e-6)
    shares = {i: float(w.double().sum()) for i, w in by_sequence(batch.micro_batches, weight).items()}
    lengths = [len(c.sequence.token_ids) for g in groups for c in g.episodes]
    for i, n in enumerate(lengths):
        share = {"token_mean": n / sum(lengths), "sequence_mean": 1 / 16, "horizon": n / (16 * 20)}[reduction]
        assert shares[i] == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "reduction"),
    [
        (DRPO(0.2), "horizon"),
        (PPOClip(), "sequence_mean"),
        pytest.param(DRPO(0.2), "token_mean", marks=pytest.mark.slow),
    ],
    ids=["drpo horizon", "ppo sequence_mean", "drpo token_mean"],
)
def test_skipping_zero_advantages_is_exact(objective: object, reduction: str, groups: list[ScoredGroup]) -> None:
    """To the bit, one row at a time; the normaliser counts what is skipped."""
    policy = policy_of(perturb(tiny(STOPS)[0], 0.02))
    plain = how(micro_batch_tokens=1, reduction=REDUCTIONS[reduction])
    (all_rows,) = batched(groups, plain)
    (fewer,) = batched(groups, replace(plain, skip_zero_advantage=True))
    assert (fewer.n_episodes, fewer.n_tokens) == (all_rows.n_episodes, all_rows.n_tokens) == (16, all_rows.n_tokens)
    assert (all_rows.n_skipped, fewer.n_skipped) == (0, 10)
    assert (len(all_rows.micro_batches), len(fewer.micro_batches)) == (16, 6)
    wanted, _ = gradients(policy, all_rows, objective)
    found, stats = gradients(policy, fewer, objective)
    assert equal(found, wanted)
    assert (stats.tokens.advantage != 0).all()
    weights = by_sequence(all_rows.micro_batches, torch.cat([m.weight for m in all_rows.micro_batches]))
    for i, weight in by_sequence(fewer.micro_batches, torch.cat([m.weight for m in fewer.micro_batches])).items():
        assert torch.equal(weight, weights[i])


@pytest.mark.parametrize(
    "before",
    [pytest.param(0, id="first update", marks=pytest.mark.slow), pytest.param(1, id="with momentum")],
)
def test_a_batch_that_says_nothing_still_steps(before: int, rollout: list[Episode], groups: list[ScoredGroup]) -> None:
    """Weight decay and momentum act on it exactly as if its completions had gone through the model."""
    silent = grouped(rollout, [[0.7] * 4] * 4)
    weights, steps = [], []
    for skip in (False, True):
        policy = policy_of(tiny(STOPS)[0])
        optimizer = AdamW(0.01, weight_decay=0.1).build(list(policy.trainable().values()), [])
        for rewarded in [groups] * before + [silent]:
            (batch,) = batched(rewarded, how(skip_zero_advantage=skip, micro_batch_tokens=1))
            start = {name: p.detach().clone() for name, p in policy.trainable().items()}
            stats = update_policy(policy, optimizer, batch, DRPO(0.2), 0.01, 1.0)
        assert len(batch.micro_batches) == (0 if skip else 16)
        assert (batch.n_episodes, stats.grad_norm, stats.loss) == (16, 0.0, 0.0)
        assert len(stats.tokens.logp) == len(stats.entropy) == sum(len(m.target) for m in batch.micro_batches)
        weights.append({name: p.detach().clone() for name, p in policy.trainable().items()})
        steps.append({float(state["step"]) for state in optimizer.state.values()})
        assert not equal(weights[-1], start)
    assert equal(*weights)
    assert steps == [{before + 1.0}] * 2


def test_a_gradient_that_is_not_finite_changes_nothing(groups: list[ScoredGroup]) -> None:
    policy = policy_of(tiny(STOPS)[0])
    optimizer = AdamW(0.01, weight_decay=0.1).build(list(policy.trainable().values()), [])
    (batch,) = batched(groups, how())
    next(iter(policy.trainable().values())).register_hook(lambda gradient: gradient * torch.nan)
    start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    stats = update_policy(policy, optimizer, batch, DRPO(0.2), 0.01, 1.0)
    assert not stats.taken and stats.grad_norm != stats.grad_norm and not optimizer.state
    assert equal(start, {name: p.detach() for name, p in policy.trainable().items()})


@pytest.mark.parametrize("share", [pytest.param(True, marks=pytest.mark.slow), False])
def test_what_does_not_fit_is_halved_and_the_update_is_the_same(
    groups: list[ScoredGroup], share: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plenty, cramped = (policy_of(tiny(STOPS)[0]) for _ in range(2))
    cramped.shares_prompts = share
    batch = batched(groups, how(micro_batch_tokens=400))[0]
    small = batched(groups, how(micro_batch_tokens=400, share_prompts=share))[0]
    wanted, _ = gradients(plenty, batch)
    device = Cramped(cramped, room=130)
    with caplog.at_level("WARNING", logger="drpo"):
        found, stats = gradients(cramped, small)
    assert "out of memory with a micro-batch of" in caplog.text and max(device.tried) > 130
    assert len(stats.tokens.logp) == sum(len(m.target) for m in batch.micro_batches)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    device.tried.clear()
    gradients(cramped, small)
    assert max(device.tried) <= 130  # it has learnt what fits


def test_a_completion_that_does_not_fit_alone_is_named(groups: list[ScoredGroup]) -> None:
    policy = policy_of(tiny(STOPS)[0])
    Cramped(policy, room=5)
    with pytest.raises(InputError, match=r"out of memory with a single completion of \d+ tokens: lower"):
        gradients(policy, batched(groups, how())[0])


# ---- the anchor ----


def test_the_anchor_is_what_the_sampler_reported_through_all_updates(rollout: list[Episode]) -> None:
    """Four large updates on one rollout: mu never moves, pi is the model's own before each step, r their quotient."""
    model, _ = tiny(STOPS)
    policy = policy_of(model)
    optimizer = AdamW(0.03, weight_decay=0.0).build(list(policy.trainable().values()), [])
    reported = [c.sequence.behavior_logp.clone() for c in rollout]
    batches = batched(grouped(rollout, [[0.0, 1.0, 0.0, 0.5]] * 4), how(updates=2))
    far = []
    for batch in [*batches, *batches]:
        at = 0 if batch is batches[0] else 8
        own = [own_logp(model, c, 1.0) for c in rollout[at : at + 8]]
        stats = update_policy(policy, optimizer, batch, DRPO(0.2), 0.03, 1.0)
        mu = by_sequence(batch.micro_batches, stats.tokens.behavior_logp)
        pi = by_sequence(batch.micro_batches, stats.tokens.logp)
        r = by_sequence(batch.micro_batches, ratio(stats.tokens))
        assert len(mu) == 8
        for i in range(8):
            assert torch.equal(mu[i], reported[at + i])
            torch.testing.assert_close(pi[i], own[i], rtol=0, atol=2e-5)
            torch.testing.assert_close(r[i], torch.exp(own[i] - reported[at + i]), rtol=1e-4, atol=0)
        far.append(float((ratio(stats.tokens) - 1).abs().max()))
    assert all(torch.equal(c.sequence.behavior_logp, mu) for c, mu in zip(rollout, reported, strict=True))
    assert far[0] < 1e-4
    assert min(far[1:]) > 0.3


@contextmanager
def counted(policy: Policy) -> Iterator[Counter]:
    """Forward passes of the whole model and of its decoder."""
    calls: Counter = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in (("model", policy.model), ("decoder", policy.model.get_decoder()))
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("budget", [1, 163, 10_000])
def test_one_forward_pass_for_each_micro_batch(groups: list[ScoredGroup], budget: int) -> None:
    """No pass for old log-probabilities, and none through the head that would hold all logits."""
    policy = policy_of(tiny(STOPS)[0])
    (batch,) = batched(groups, how(micro_batch_tokens=budget, skip_zero_advantage=True))
    with counted(policy) as calls:
        gradients(policy, batch)
    assert calls == {"decoder": len(batch.micro_batches)}


# ---- grouping ----


@dataclass
class StubPool:
    """Marks with a function, where it stands; counts what it was asked."""

    reward: Callable[[Problem, str], float | None]
    failure: Failure | None = None
    config: RewardConfig = field(default_factory=RewardConfig)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def score(self, items: Sequence[tuple[Problem, Transcript]]) -> list[Scored]:
        self.asked += [(p.id, transcript.text) for p, transcript in items]
        values = [self.reward(p, transcript.text) for p, transcript in items]
        return [Scored(None, self.failure, 0.0) if v is None else Scored(RewardResult(v), None, 0.0) for v in values]


RAISED = Failure("raised", "it raised")
IDS = ("p10", "p2", "p1", "", "p")


def in_groups(problems: Sequence[Problem], episodes: Sequence[Episode]) -> list[list[Episode]]:
    return [[e for e in episodes if e.problem_id == p.id] for p in problems]


def fake_rollout(dropped: set[tuple[str, int]]) -> tuple[list[Problem], list[Episode]]:
    problems = [Problem.of_text(name, f"question {i}", "") for i, name in enumerate(IDS)]
    completions = [
        replace(completion([i + 1, n + 1], problem=p.id, sample=n), text=f"{p.id}/{n}")
        for i, p in enumerate(problems)
        for n in range(4)
        if (p.id, n) not in dropped
    ]
    return problems, completions


@given(
    dropped=st.sets(st.tuples(st.sampled_from(IDS), st.integers(0, 3)), max_size=12),
    order=st.randoms(use_true_random=False),
    updates=st.integers(1, 5),
)
def test_a_reward_of_the_prompt_alone_teaches_nothing(dropped: set, order: random.Random, updates: int) -> None:
    """Whichever completions are missing, each is compared with its own group."""
    problems, completions = fake_rollout(dropped)
    order.shuffle(problems)
    pool = StubPool(lambda problem, text: {name: 0.1 + i for i, name in enumerate(IDS)}[problem.id])
    groups = score(problems, in_groups(problems, completions), pool)
    assert [g.problem for g in groups] == problems
    assert sorted(pool.asked) == sorted((c.problem_id, c.text) for c in completions)
    for group in groups:
        mine = [c for c in completions if c.problem_id == group.problem.id]
        assert list(group.episodes) == sorted(mine, key=lambda c: c.sample)
        assert len(group.rewards) == len(mine)
    for batch in batched(groups, how(updates=updates)):
        assert all((m.advantage == 0).all() for m in batch.micro_batches)
    for batch in batched(groups, how(updates=updates, skip_zero_advantage=True)):
        assert batch.micro_batches == ()


@given(unscored=st.sets(st.integers(0, 3), max_size=2))
def test_each_reward_stays_with_its_completion(unscored: set[int]) -> None:
    """The negative control: a reward of the sample gives that sample's advantage."""
    problems, completions = fake_rollout(set())

    def reward(problem: Problem, text: str) -> float | None:
        name, _, sample = text.rpartition("/")
        assert name == problem.id
        return None if int(sample) in unscored else float(sample) ** 2

    groups = score(problems, in_groups(problems, completions), StubPool(reward))
    for group in groups:
        assert [c.sample for c in group.episodes] == [n for n in range(4) if n not in unscored]
        assert group.rewards.tolist() == [float(c.sample) ** 2 for c in group.episodes]
        assert sorted(u.episode.sample for u in group.unscored) == sorted(unscored)
        assert all(u.failure is None for u in group.unscored)
    (batch,) = batched(groups, how())
    marked = [n**2 for n in range(4) if n not in unscored]
    for m in batch.micro_batches:
        sample = m.target[1::2] - 1
        expected = sample.double() ** 2 - sum(marked) / len(marked)
        torch.testing.assert_close(m.advantage[1::2].double(), expected)


def test_failures_are_kept_with_their_reason() -> None:
    problems, completions = fake_rollout(set())
    pool = StubPool(lambda problem, text: None if text.endswith("/2") else 1.0, failure=RAISED)
    for group in score(problems, in_groups(problems, completions), pool):
        assert [(u.episode.sample, u.failure) for u in group.unscored] == [(2, RAISED)]


def test_a_failure_may_score_zero_and_is_told_from_a_wrong_answer() -> None:
    problems, completions = fake_rollout(set())
    pool = StubPool(lambda problem, text: None if text.endswith("/2") else 1.0, RAISED, RewardConfig(on_failure="zero"))
    for group in score(problems, in_groups(problems, completions), pool):
        assert group.rewards.tolist() == [1.0, 1.0, 0.0, 1.0]
        assert [c.sample for c in group.episodes] == [0, 1, 2, 3] and group.unscored == ()
        assert [(u.episode.sample, u.failure) for u in group.scored_zero] == [(2, RAISED)]
        assert group.failures == (RAISED,)


def test_abstaining_is_no_failure_under_any_policy() -> None:
    problems, completions = fake_rollout(set())
    for policy in ("drop", "zero", "error"):
        pool = StubPool(
            lambda problem, text: None if text.endswith("/2") else 1.0, None, RewardConfig(on_failure=policy)
        )
        for group in score(problems, in_groups(problems, completions), pool):
            assert [u.episode.sample for u in group.unscored] == [2] and group.scored_zero == group.failures == ()


def test_a_failure_may_end_the_run_in_one_line() -> None:
    problems, completions = fake_rollout(set())
    pool = StubPool(lambda problem, text: None if text == "p1/2" else 1.0, RAISED, RewardConfig(on_failure="error"))
    with pytest.raises(InputError, match=r"failed on 1 of 20 completions, first on one of problem 'p1': it raised; "):
        require_scored(score(problems, in_groups(problems, completions), pool), pool.config)


@pytest.mark.parametrize("failure", [RAISED, None], ids=["failed", "abstained"])
def test_a_rollout_without_a_single_mark_is_refused(failure: Failure | None) -> None:
    """Nothing could be averaged over it, let alone trained."""
    problems, completions = fake_rollout(set())
    groups = score(problems, in_groups(problems, completions), StubPool(lambda problem, text: None, failure))
    with pytest.raises(InputError, match="it raised" if failure else "abstained"):
        require_scored(groups, RewardConfig())
    assert score([], [], StubPool(lambda problem, text: None)) == []


# ---- LoRA ----


def lora() -> Policy:
    """With adapters that do something (a new one's second factor is 0)."""
    policy = policy_of(tiny(STOPS)[0], lora_rank=4)
    perturb(policy.model, 0.1)
    return policy


def base_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if ".lora_" not in name}


def test_lora_trains_the_adapters_of_all_linear_layers_but_the_head(groups: list[ScoredGroup]) -> None:
    policy = policy_of(tiny(STOPS)[0], lora_rank=4)
    names = list(policy.trainable())
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    before = base_weights(policy)
    optimizer = AdamW(0.01, weight_decay=0.1).build(list(policy.trainable().values()), [])
    adapters = {name: p.detach().clone() for name, p in policy.trainable().items()}
    for _ in range(2):  # after the first, both factors have a gradient
        update_policy(policy, optimizer, batched(groups, how())[0], DRPO(0.2), 0.01, 1.0)
    assert equal(base_weights(policy), before)
    assert all(not torch.equal(p, adapters[name]) for name, p in policy.trainable().items())
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in adapters.values()
    )


def test_lora_starts_as_the_model_and_depends_on_its_seed_alone() -> None:
    plain, _ = tiny(STOPS)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    policies = [policy_of(tiny(STOPS)[0], lora_rank=4, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    one, again, other = ({name: p.detach() for name, p in p.trainable().items()} for p in policies)
    assert equal(one, again)
    assert not equal(one, other)
    state = policies[0].state()
    assert all(torch.equal(p, state[name]) for name, p in plain.named_parameters())


def test_merging_many_times_leaves_the_base_as_it_was() -> None:
    policy = lora()
    before = base_weights(policy)
    first = {name: value.clone() for name, value in policy.state().items()}
    for _ in range(30):
        state = policy.state()
    assert equal(base_weights(policy), before)
    assert equal(dict(state), first)
    adapted = [name for name in before if ".base_layer." in name]
    assert len(adapted) == 14
    assert all(not torch.equal(first[name.replace(".base_layer.", ".")], before[name]) for name in adapted)


def test_the_merged_state_is_the_adapted_model() -> None:
    """Added once, by the plain model's names, and shared with nothing that training changes."""
    policy = lora()
    plain, _ = tiny(STOPS)
    assert policy.state().keys() == dict(plain.named_parameters()).keys()
    state = policy.state()
    plain.load_state_dict(dict(state), strict=False)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        adapted = policy.model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, adapted, rtol=0, atol=2e-5)
        unadapted = tiny(STOPS)[0](input_ids=ids).logits
    assert (unadapted - adapted).abs().max() > 0.5
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in state.values())


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_saved_loaded_and_sampled_from(rank: int, tmp_path: Path) -> None:
    policy = policy_of(tiny(STOPS)[0], lora_rank=rank)
    perturb(policy.model, 0.1)
    _, tokenizer = tiny()
    policy.plain().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for name, value in policy.state().items():
        assert torch.equal(loaded.get_parameter(name), value), name
    engine = transformers_engine(tiny(STOPS)[0], tokenizer)
    engine.load_weights(policy.state(), version=1)
    sampling = Sampling(samples=4, max_new_tokens=12)
    ours = engine.generate(PROBLEMS, sampling, (0,))
    theirs = transformers_engine(loaded, tokenizer).generate(PROBLEMS, sampling, (0,))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.sequence.token_ids, other.sequence.token_ids)
        assert torch.equal(one.sequence.behavior_logp, other.sequence.behavior_logp)
        torch.testing.assert_close(one.sequence.behavior_logp, own_logp(policy.model, one, 1.0), rtol=0, atol=2e-5)


def test_after_a_lora_update_the_engine_samples_with_the_adapted_distribution(groups: list[ScoredGroup]) -> None:
    model, tokenizer = tiny(STOPS)
    engine = transformers_engine(model, tokenizer)
    policy = policy_of(model, lora_rank=4)
    optimizer = AdamW(0.05, weight_decay=0.0).build(list(policy.trainable().values()), [])
    for version in (1, 2):
        update_policy(policy, optimizer, batched(groups, how())[0], DRPO(0.2), 0.05, 1.0)
        engine.load_weights(policy.state(), version=version)
    completions = engine.generate(PROBLEMS, Sampling(samples=4, max_new_tokens=12), (0,))
    assert {c.version for c in completions} == {2}
    (batch,) = batched(grouped(completions, REWARDS), how())
    _, stats = gradients(policy, batch)
    assert (ratio(stats.tokens) - 1).abs().max() < 2e-5
    gaps = [own_logp(tiny(STOPS)[0], c, 1.0) - c.sequence.behavior_logp for c in completions]
    assert max(float(gap.abs().max()) for gap in gaps) > 0.3


def test_an_engine_does_not_hold_the_trainers_own_tensors(groups: list[ScoredGroup]) -> None:
    for rank in (0, 4):
        model, tokenizer = tiny(STOPS)
        engine = transformers_engine(model, tokenizer)
        policy = policy_of(model, lora_rank=rank)
        engine.load_weights(policy.state(), version=1)
        trainers = {p.data_ptr() for p in policy.model.parameters()}
        assert not any(p.data_ptr() in trainers for p in engine.model.parameters())


# ---- precision ----


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_bfloat16_compute_keeps_weights_and_gradients_in_float32(groups: list[ScoredGroup], rank: int) -> None:
    policy = policy_of(tiny(STOPS)[0], dtype=torch.bfloat16, lora_rank=rank)
    optimizer = AdamW(0.01, weight_decay=0.1).build(list(policy.trainable().values()), [])
    (batch,) = batched(groups, how())
    seen: set[torch.dtype] = set()
    layer = next(m for m in policy.model.modules() if isinstance(m, torch.nn.Linear))
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    stats = update_policy(policy, optimizer, batch, DRPO(0.2), 0.01, 1.0)
    hook.remove()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in policy.trainable().values()} == {torch.float32}
    moments = {v.dtype for state in optimizer.state.values() for k, v in state.items() if k != "step"}
    assert moments == {torch.float32}
    assert {v.dtype for v in policy.state().values()} == {torch.float32}
    assert {stats.tokens.logp.dtype, stats.entropy.dtype} == {torch.float32}


def test_bfloat16_compute_is_near_float32(groups: list[ScoredGroup]) -> None:
    (batch,) = batched(groups, how())
    exact, stats = gradients(policy_of(tiny(STOPS)[0]), batch)
    rough, rough_stats = gradients(policy_of(tiny(STOPS)[0], dtype=torch.bfloat16), batch)
    gap = (rough_stats.tokens.logp - stats.tokens.logp).abs()
    assert 1e-4 < gap.max() < 0.15  # it did compute in bfloat16, and logits of about 6 came out to 8 bits
    one, other = (torch.cat([g.flatten() for g in gs.values()]) for gs in (exact, rough))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


# ---- heads ----


def _tiny_config(kind: type, **more: object) -> object:
    return kind(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )


HEADS: dict[str, tuple[Callable[[], PreTrainedModel], HeadShape, bool]] = {
    "bias": (lambda: PhiForCausalLM(_tiny_config(PhiConfig)), HeadShape(1.0, None), True),
    "scale": (
        lambda: GraniteForCausalLM(_tiny_config(GraniteConfig, logits_scaling=8.0)),
        HeadShape(0.125, None),
        False,
    ),
    "soft cap": (
        lambda: Gemma2ForCausalLM(_tiny_config(Gemma2Config, head_dim=8, final_logit_softcapping=0.5)),
        HeadShape(1.0, 0.5),
        False,
    ),
    "soft cap far above the logits": (
        lambda: Gemma2ForCausalLM(_tiny_config(Gemma2Config, head_dim=8, final_logit_softcapping=30.0)),
        HeadShape(1.0, 30.0),
        False,
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_heads_bias_scale_and_soft_cap_are_found(head: str) -> None:
    build, shape, biased = HEADS[head]
    torch.manual_seed(0)
    policy = policy_of(build().eval())
    assert policy._head_shape == shape
    assert (policy.head.bias is not None) == biased
    ids = torch.arange(5)
    torch.testing.assert_close(policy.logits(ids), policy.model(ids[None]).logits[0].detach(), rtol=1e-4, atol=1e-5)


def test_logits_of_anything_else_are_refused() -> None:
    model = Qwen2ForCausalLM(_tiny_config(Qwen2Config)).eval()
    for broken in (model.model, squared(model)):
        with pytest.raises(InputError, match="its logits are not those of one linear layer"):
            policy_of(broken)


def squared(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose logits are squared."""
    forward = model.forward

    def square(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits.square()
        return out

    model.forward = square  # type: ignore[method-assign]
    return model
