"""PPO with a critic: its advantages from their definition, its values at the right positions, and runs that have one.

Not covered: a GPU. Several processes: test_ranks.py.
"""

import json
import math
import re
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from drpo import cli
from drpo.batch import BatchConfig, make_batches, pack
from drpo.credit import gae_credit
from drpo.credit.gae import GAE, REGISTRY, explained_variance, gae, value_loss, whitened
from drpo.errors import InputError
from drpo.lab.replay import recorded
from drpo.model.critic import Critic
from drpo.objectives import DRPO, PPOClip, gradient_weight
from drpo.reductions import Horizon
from drpo.report.distribution import trained_columns
from drpo.report.run_page import write_report
from drpo.report.token_statistics import read_rollouts, tokens_of
from drpo.spec import format_spec, parse_spec
from drpo.train import stored
from drpo.train.config import Run, configure, from_json, learning_rate, read_value, to_json
from drpo.train.critic import PREFIX, CriticTrainer
from drpo.train.loop import train
from drpo.train.metric_tables import VALUE_METRICS
from drpo.train.metrics import value_metrics
from drpo.train.optim import AdamW
from drpo.train.records import CHECKPOINTS, METRICS, ROLLOUTS, read_records
from drpo.train.rollout_record import trained_rows
from drpo.train.setup import build
from drpo.types import Batch, Credit, CriticStats, MicroBatch, Sampling, ScoredGroup, TokenSequence
from support.families import build as build_family
from support.runs import StopsAfter, assert_same_run
from support.tiny_world import STOPS, by_sequence, completion, doubled, grouped, perturb, sampled, tiny
from support.worlds import few_run, sampling, tiny_run

pytestmark = pytest.mark.filterwarnings("ignore:.*CPU autocast.*:UserWarning")

REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.5, 0.5), (1.0, 1.0, 1.0, 1.0))
CRITIC_RUN = {"critic": GAE(updates=2), "critic_optimizer": AdamW(1e-3), "objective": PPOClip(0.2, 0.2)}


# ---- advantages and returns, from their definition ----


@st.composite
def episodes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    reward, value = torch.randn(2, sum(lengths), generator=generator, dtype=torch.float64)
    return reward, value, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def by_definition(reward: Sequence[float], value: Sequence[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, of one completion, term by term."""
    behind = [*value[1:], 0.0]
    found = []
    for t in range(len(reward)):
        total = 0.0
        for k in range(len(reward) - t):
            total += (gamma * lam) ** k * (reward[t + k] + gamma * behind[t + k] - value[t + k])
        found.append(total)
    return found


@given(episodes(), st.floats(0.01, 1), st.floats(0, 1))
def test_advantages_are_what_the_definition_says(given_: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float):
    reward, value, sequence = given_
    advantage, returns = gae(reward, value, sequence, gamma, lam)
    parts = [
        by_definition(reward[sequence == s].tolist(), value[sequence == s].tolist(), gamma, lam)
        for s in sequence.unique()
    ]
    wanted = torch.tensor([a for part in parts for a in part], dtype=torch.float64)
    torch.testing.assert_close(advantage, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, wanted + value, rtol=1e-12, atol=1e-12)


@given(episodes(), st.floats(0.01, 1))
def test_the_ends_of_lambda_have_closed_forms(given_: tuple[Tensor, Tensor, Tensor], gamma: float):
    """lambda 1: what was earned from here on, less the value; lambda 0: the error of one step."""
    reward, value, sequence = given_
    whole, _ = gae(reward, value, sequence, gamma, 1.0)
    step, _ = gae(reward, value, sequence, gamma, 0.0)
    for s in sequence.unique():
        r, v = reward[sequence == s], value[sequence == s]
        power = gamma ** torch.arange(len(r), dtype=torch.float64)
        earned = torch.stack([(r[t:] * power[: len(r) - t]).sum() for t in range(len(r))])
        torch.testing.assert_close(whole[sequence == s], earned - v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(step[sequence == s], r + gamma * torch.cat([v[1:], torch.zeros(1)]) - v)


@given(episodes(), st.floats(0, 1))
def test_completions_do_not_touch(given_: tuple[Tensor, Tensor, Tensor], lam: float):
    """All at once is each alone, to the bit."""
    reward, value, sequence = given_
    together = gae(reward, value, sequence, 0.97, lam)
    for s in sequence.unique():
        own = sequence == s
        for one, all_ in zip(gae(reward[own], value[own], sequence[own], 0.97, lam), together, strict=True):
            assert torch.equal(one, all_[own])


def test_a_long_completion_loses_no_precision():
    n = 3000
    reward, value = torch.zeros(n), torch.full((n,), 0.5)
    reward[-1] = 1.0
    advantage, returns = gae(reward, value, torch.zeros(n, dtype=torch.int64), 1.0, 1.0)
    assert torch.equal(advantage, torch.full((n,), 0.5)) and torch.equal(returns, torch.ones(n))


def test_no_tokens_no_advantages():
    nothing = torch.empty(0)
    assert [len(x) for x in gae(nothing, nothing, nothing.long(), 1.0, 0.95)] == [0, 0]


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30))
def test_whitened_advantages_have_mean_0_and_deviation_1(values: list[float]):
    given_ = torch.tensor(values, dtype=torch.float64)
    found = whitened(given_)
    if len(set(values)) == 1:
        assert not found.any()
    elif float(given_.std()) > 1e-6:
        assert float(found.mean()) == pytest.approx(0, abs=1e-6)
        assert float(found.square().mean()) == pytest.approx(1)


# ---- the value loss ----


@given(
    st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=1, max_size=20),
    st.one_of(st.none(), st.floats(0.01, 1)),
)
def test_the_value_loss_and_its_gradient(rows: list[tuple[float, float, float]], clip: float | None):
    """Against the plain formula written out for each case."""
    value, old, returns = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    value.requires_grad_()
    loss = value_loss(value, old, returns, clip)
    (slope,) = torch.autograd.grad(loss.sum(), value)
    for v, o, r, found, gradient in zip(*(x.tolist() for x in (value, old, returns, loss, slope)), strict=True):
        bound = v if clip is None else max(o - clip, min(o + clip, v))
        worse = abs(bound - r) > abs(v - r)
        assert found == pytest.approx(max((v - r) ** 2, (bound - r) ** 2) / 2, abs=1e-12)
        if abs(abs(bound - r) - abs(v - r)) > 1e-9 or bound == v:
            assert gradient == pytest.approx(0.0 if worse else v - r, abs=1e-12)


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 1.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 7.0), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4)) is None


# ---- the critic on packed positions ----


@pytest.fixture(scope="module")
def groups() -> list[ScoredGroup]:
    return grouped(sampled(*tiny(STOPS)), REWARDS)


def how(**changes: object) -> BatchConfig:
    plain = BatchConfig(1, Horizon(20), micro_batch_tokens=200, skip_zero_advantage=False)
    return replace(plain, **changes)  # type: ignore[arg-type]


def critic_of(seed: int = 0, *, wide: bool = False) -> Critic:
    """A critic whose head says something."""
    model, _ = tiny(STOPS)
    critic = Critic(perturb(doubled(model) if wide else model, 0.02), dtype=torch.float64 if wide else torch.float32)
    critic.head.double() if wide else None
    nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.constant_(critic.head.bias, 0.25)
    return critic


def trainer_of(critic: Critic, settings: GAE = GAE(), *, rate: float = 0.0) -> CriticTrainer:  # noqa: B008 (frozen)
    """At a rate of 0 its step goes nowhere, and so leaves the gradients to look at."""
    optimizer = AdamW(rate, weight_decay=0.0).build(list(critic.trainable().values()), critic.embeddings())
    return CriticTrainer(critic, optimizer, settings, rate, max_grad_norm=1e30, micro_batch_tokens=200)


def values_of(critic: Critic, s: TokenSequence) -> Tensor:
    """[N] from one plain pass: the value of what stands before each token."""
    ids = torch.cat([s.prompt_ids, s.token_ids])
    states = critic.model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return critic.head(states)[len(s.prompt_ids) - 1 : -1, 0]


def column(micros: Sequence[MicroBatch], name: str) -> dict[int, Tensor]:
    return by_sequence(micros, torch.cat([getattr(m, name) for m in micros]))


def credited(trainer: CriticTrainer, groups: Sequence[ScoredGroup], *, moved: float = 0.0) -> list[Credit]:
    """As the critic credits a rollout; `moved`: as if it had learnt since, so that some of its values left the clip."""
    credits = gae_credit(groups, trainer.values(groups), critic=trainer.config)
    return [replace(c, value=c.value + moved * torch.sin(c.sequence.token_ids.float())) for c in credits]


def batched(
    trainer: CriticTrainer, groups: Sequence[ScoredGroup], config: BatchConfig, *, moved: float = 0.0
) -> list[Batch]:
    return make_batches(groups, credited(trainer, groups, moved=moved), config)


def learnt(trainer: CriticTrainer, batches: Sequence[Batch]) -> dict[str, float]:
    return value_metrics(batches, trainer.train(batches))


def gradients(trainer: CriticTrainer, batch: Batch) -> dict[str, Tensor]:
    trainer.train([batch])
    return {name: p.grad.clone() for name, p in trainer.critic.trainable().items()}  # type: ignore[union-attr]


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    scale = max(float(value.abs().max()) for value in other.values())
    assert one.keys() == other.keys() and scale > 0
    for name, value in one.items():
        assert float((value - other[name]).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("shared", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 163, 10_000])
def test_values_are_those_of_the_text_before_each_token(budget: int, shared: bool, groups: list[ScoredGroup]):
    critic = critic_of(wide=True)
    wanted = [values_of(critic, c.sequence).detach() for g in groups for c in g.episodes]
    critic.shares_prompts = shared
    for value, right in zip(replace(trainer_of(critic), micro_batch_tokens=budget).values(groups), wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)


def test_the_decoder_of_a_language_model_with_a_head_within_another_model_is_found(groups: list[ScoredGroup]):
    """Llama 4's."""
    model = build_family("llama4")
    decoder = model.model.language_model.model if hasattr(model, "model") else model.language_model.model
    critic = Critic(model, dtype=torch.float32)
    nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    sequence = groups[0].episodes[0].sequence
    ids = torch.cat([sequence.prompt_ids, sequence.token_ids])[None]
    (micro,) = pack([sequence], 10_000, critic.shares_prompts).micro_batches
    with torch.no_grad():
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(sequence.prompt_ids) - 1 : -1]
        torch.testing.assert_close(critic(micro), critic.head(states)[:, 0], rtol=0, atol=1e-5)


def test_a_new_critic_expects_nothing(groups: list[ScoredGroup]):
    trainer = trainer_of(Critic(tiny(STOPS)[0], dtype=torch.float32))
    assert not torch.cat(trainer.values(groups)).any()


@pytest.mark.parametrize("whiten", [False, True])
def test_a_critic_credits_each_token_with_its_advantage(whiten: bool, groups: list[ScoredGroup]):
    """The reward comes with the last token, each completion is an episode, and whitening is over the whole rollout."""
    critic, settings = critic_of(), GAE(gamma=0.99, lam=0.9, whiten=whiten)
    batches = batched(trainer_of(critic, settings), groups, how(updates=2))
    rewards = [r for g in groups for r in g.rewards.tolist()]
    texts = [c for g in groups for c in g.episodes]
    values = [values_of(critic, c.sequence).detach() for c in texts]
    plain = [
        torch.tensor(by_definition([0.0] * (len(v) - 1) + [r], v.tolist(), 0.99, 0.9))
        for v, r in zip(values, rewards, strict=True)
    ]
    every = torch.cat(plain)
    shift, scale = (every.mean(), every.std(correction=0)) if whiten else (0.0, 1.0)
    first = 0
    for batch in batches:
        found = {name: column(batch.micro_batches, name) for name in ("advantage", "value", "returns")}
        for i, credit in enumerate(batch.credits):
            wanted, value = plain[first + i], values[first + i]
            assert credit.sequence is texts[first + i].sequence
            assert all(torch.equal(found[name][i], getattr(credit, name)) for name in found)
            torch.testing.assert_close(found["value"][i], value, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["returns"][i], wanted + value, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["advantage"][i], (wanted - shift) / scale, rtol=1e-4, atol=1e-4)
        first += len(batch.credits)
    assert first == len(texts)


def test_its_gradient_is_that_of_the_plain_formula(groups: list[ScoredGroup]):
    trainer = trainer_of(critic_of(), GAE(clip=0.05))
    (batch,) = batched(trainer, groups, how(), moved=0.1)
    found = gradients(trainer, batch)
    old, earned, weight = (column(batch.micro_batches, name) for name in ("value", "returns", "weight"))
    loss = torch.tensor(0.0)
    for i, credit in enumerate(batch.credits):
        value = values_of(trainer.critic, credit.sequence)
        near = torch.minimum(torch.maximum(value, old[i] - 0.05), old[i] + 0.05)
        worse = torch.where((near - earned[i]).abs() > (value - earned[i]).abs(), near, value)
        loss = loss + (weight[i] * (worse - earned[i]) ** 2 / 2).sum()
    parameters = trainer.critic.trainable()
    wanted = torch.autograd.grad(loss, list(parameters.values()))
    close(found, dict(zip(parameters, wanted, strict=True)), 1e-4)


def test_splitting_a_batch_changes_nothing(groups: list[ScoredGroup]):
    wanted = None
    for budget in (10_000, 163, 1):
        trainer = trainer_of(critic_of(), GAE(clip=0.05))
        (batch,) = batched(trainer, groups, how(micro_batch_tokens=budget), moved=0.1)
        found = gradients(trainer, batch)
        wanted = wanted or found
        close(found, wanted)


class Cramped:
    """A critic on a device that has room for so many positions."""

    def __init__(self, critic: Critic, room: int) -> None:
        self._critic, self._room, self.tried = critic, room, []

    def __getattr__(self, name: str) -> object:
        return getattr(self._critic, name)

    def _fit(self, micro: MicroBatch) -> None:
        self.tried.append(len(micro.input_ids))
        if len(micro.input_ids) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, micro: MicroBatch) -> Tensor:
        self._fit(micro)
        return self._critic(micro)

    def loss(self, micro: MicroBatch, clip: float | None) -> tuple[Tensor, Tensor]:
        self._fit(micro)
        return self._critic.loss(micro, clip)


def test_what_does_not_fit_is_halved_and_the_critics_values_and_update_are_the_same(groups: list[ScoredGroup]):
    plenty = trainer_of(critic_of(), GAE(clip=0.05))
    (batch,) = batched(plenty, groups, how(micro_batch_tokens=400), moved=0.1)
    device = Cramped(critic_of(), room=130)
    cramped = replace(trainer_of(device, GAE(clip=0.05)), micro_batch_tokens=400)
    for value, right in zip(cramped.values(groups), plenty.values(groups), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)
    assert max(device.tried) > 130
    for learnt_before in (False, True):  # begin again in the middle of an update, and begin with what fits
        device.max_positions = device.max_positions if learnt_before else None
        device.tried.clear()
        close(gradients(cramped, batch), gradients(plenty, batch))
        assert (max(device.tried) > 130) != learnt_before
    with pytest.raises(InputError, match="out of memory with a single completion"):
        trainer_of(Cramped(critic_of(), room=5)).train([batch])


def test_a_token_without_weight_is_a_removed_token(groups: list[ScoredGroup]):
    """A group of weight 0, and the same batch without it."""
    trainer = trainer_of(critic_of())
    credits = credited(trainer, groups)
    (batch,) = make_batches(groups, credits, how(micro_batch_tokens=10_000))
    (micro,) = batch.micro_batches
    masked = replace(batch, micro_batches=(replace(micro, weight=torch.where(micro.sequence < 4, 0.0, micro.weight)),))
    (other,) = make_batches(groups[1:], credits, how(micro_batch_tokens=10_000))
    (rest,) = other.micro_batches
    rest = replace(rest, weight=rest.weight * 12 / 16)  # a horizon's weights: 1 / (S H)
    close(gradients(trainer, masked), gradients(trainer, replace(other, micro_batches=(rest,))))


@pytest.mark.slow
def test_the_critic_learns_the_rewards(groups: list[ScoredGroup]):
    """On one rollout again and again, with lambda 1, its values become what was earned."""
    trainer = trainer_of(critic_of(), GAE(lam=1.0, clip=None, updates=60), rate=3e-3)
    batches = batched(trainer, groups, how())
    first = learnt(trainer, batches)
    after = learnt(trainer, batched(trainer, groups, how()))
    assert first.keys() == VALUE_METRICS.keys() - {"value_skipped"}
    assert after["explained_variance"] > 0.5 > first["explained_variance"]
    assert after["value_loss"] < 0.2 * float(
        sum((m.weight * (m.value - m.returns) ** 2 / 2).sum() for m in batches[0].micro_batches)
    )


def test_the_figures_of_a_step(groups: list[ScoredGroup]):
    trainer = trainer_of(critic_of(), GAE(clip=0.1, updates=3))
    credits = credited(trainer, groups)
    every = torch.cat([c.value for c in credits])
    shifted = [replace(c, value=c.value + 0.3 * (c.sequence.token_ids % 2 == 0)) for c in credits]
    found = learnt(trainer, make_batches(groups, shifted, how()))
    even = torch.cat([c.sequence.token_ids % 2 == 0 for c in credits]).double().mean()
    assert found["value_clipped"] == pytest.approx(float(even)) and 0 < float(even) < 1
    assert found["value_mean"] == pytest.approx(float(every.mean() + 0.3 * even), rel=1e-5)
    assert learnt(trainer, []) == {} and trainer.values([]) == [] == credited(trainer, [])


def test_groups_of_one_train_where_a_critic_gives_advantages():
    single = grouped([completion([5, 6], problem="a"), completion([7], problem="b")], [[1.0], [0.0]])
    (batch,) = batched(trainer_of(critic_of()), single, how())
    assert batch.n_episodes == 2 and all(m.advantage.all() for m in batch.micro_batches)


# ---- runs ----


@pytest.mark.slow
def test_ppo_with_a_critic_learns_from_single_samples(tmp_path: Path):
    """A prompt's only sample has no group to be compared with."""
    settings = {"prompts": 64, "sampling": sampling(samples=1), "eval_problems": 32, "critic": GAE()}
    both = {"optimizer": AdamW(1e-2), "critic_optimizer": AdamW(1e-2)}
    run = few_run(steps=22, **(CRITIC_RUN | settings | both))
    summary = train(run, tmp_path)
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    assert after["low"] > before["high"], (before, after)
    metrics = read_records(tmp_path / METRICS)
    assert all(VALUE_METRICS.keys() - m.keys() <= {"explained_variance", "value_skipped"} for m in metrics)
    assert abs(metrics[-1]["value_mean"] - metrics[-1]["reward_mean"]) < 0.2 < metrics[-1]["reward_mean"]


def test_without_a_critic_nothing_of_it_is_there(tmp_path: Path):
    train(few_run(steps=2), tmp_path)
    assert not any(VALUE_METRICS.keys() & m.keys() for m in read_records(tmp_path / METRICS))
    assert not any("advantages" in r for r in read_records(tmp_path / ROLLOUTS))
    assert not list(tmp_path.rglob(f"{PREFIX}*"))


def test_cut_off_and_resumed_it_is_one_run_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cut off when the policy of step 3 is trained and the critic is not."""
    learn, calls = CriticTrainer.train, []

    def learn_or_stop(self: CriticTrainer, batches: Sequence[Batch]) -> list[CriticStats]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(self, batches)

    run = few_run(steps=3, checkpoint_every=2, kl_in_reward=0.1, **CRITIC_RUN)
    train(run, tmp_path / "whole")
    monkeypatch.setattr(CriticTrainer, "train", learn_or_stop)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "cut")
    assert stored.latest(tmp_path / "cut" / CHECKPOINTS).name == "step-000002"
    train(run, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    for name in (stored.WEIGHTS, stored.OPTIMIZER):
        ours, theirs = (
            load_file(stored.latest(tmp_path / f / CHECKPOINTS) / (PREFIX + name)) for f in ("whole", "cut")
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[n]) for n, value in ours.items())
    initial = build(run).critic.critic.trainable()
    trained = load_file(stored.latest(tmp_path / "whole" / CHECKPOINTS) / (PREFIX + stored.WEIGHTS))
    assert trained.keys() == initial.keys() and not any(torch.equal(trained[n], initial[n]) for n in initial)


def test_a_checkpoint_without_the_critic_or_with_a_damaged_one_is_not_used(tmp_path: Path):
    train(few_run(steps=1), tmp_path / "plain")
    trainer = build(few_run(**CRITIC_RUN)).critic
    with pytest.raises(InputError, match=r"cannot be read: no critic_weights\.safetensors"):
        trainer.restore(stored.latest(tmp_path / "plain" / CHECKPOINTS))
    train(few_run(steps=1, **CRITIC_RUN), tmp_path / "run")
    last = stored.latest(tmp_path / "run" / CHECKPOINTS)
    stored.require_sound(last)
    damaged = last / (PREFIX + stored.OPTIMIZER)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"critic_optimizer\.safetensors: damaged"):
        stored.require_sound(last)


def break_updates(monkeypatch: pytest.MonkeyPatch, broken: Container[int]) -> list[bool]:
    """Let some of the critic's updates, counted from 0, have no finite gradient; whether each changed its weights."""
    update, changed = CriticTrainer._update, []

    def breaks(self: CriticTrainer, batch: Batch) -> CriticStats:
        if len(changed) in broken:
            batch = replace(batch, micro_batches=[replace(m, weight=m.weight * math.nan) for m in batch.micro_batches])
        before = self.critic.head.weight.detach().clone()
        stats = update(self, batch)
        changed.append(not torch.equal(before, self.critic.head.weight))
        return stats

    monkeypatch.setattr(CriticTrainer, "_update", breaks)
    return changed


def test_a_broken_update_of_the_critic_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the policy's are: never more than two in a row here, so that the run ends well."""
    changed = break_updates(monkeypatch, {2, 5, 6})  # of four a step
    watch = StopsAfter(99)
    summary = train(tiny_run(steps=3, keep_checkpoints=9, **CRITIC_RUN), tmp_path, watch)
    assert summary["finished"] and [i for i, moved in enumerate(changed) if not moved] == [2, 5, 6]
    metrics = read_records(tmp_path / METRICS)
    assert [m.get("value_skipped", 0) for m in metrics] == [1, 2, 0]
    assert not any("skipped_updates" in m for m in metrics) and "NaN" not in (tmp_path / METRICS).read_text()
    assert "in update 2 of the critic; it was skipped (1 in a row, at most 2)" in watch.said
    assert "in update 2 of the critic; it was skipped (2 in a row, at most 2)" in watch.said
    assert sorted(stored.steps(tmp_path / CHECKPOINTS)) == [1, 2, 3]  # the weights behind it


def test_a_critic_that_stays_broken_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changed = break_updates(monkeypatch, {3, 4, 5})
    with pytest.raises(FloatingPointError, match=r"norm is nan \(loss nan\) in update 1 of the critic"):
        train(few_run(steps=3, **CRITIC_RUN), tmp_path)
    assert [m["value_skipped"] for m in read_records(tmp_path / METRICS)] == [1]
    assert not any(changed[3:6])


def test_while_the_critic_warms_up_the_policy_stays_as_it_is(tmp_path: Path):
    run = few_run(steps=2, optimizer=AdamW(1e-2), **CRITIC_RUN | {"critic": GAE(warmup=2)})
    assert [learning_rate(configure(run, steps=4), s, 0) for s in range(4)] == [0.0, 0.0, 1e-2, 1e-2]
    components = build(run)
    before = {name: p.detach().clone() for name, p in components.policy.trainable().items()}
    critic = {name: p.detach().clone() for name, p in components.critic.critic.trainable().items()}
    train(run, tmp_path, components=components)
    assert all(torch.equal(p, before[name]) for name, p in components.policy.trainable().items())
    assert not any(torch.equal(p, critic[name]) for name, p in components.critic.critic.trainable().items())


def test_rollouts_record_what_each_token_was_worth(tmp_path: Path):
    """The metrics of every update, the report's tokens and a replay follow from the records."""
    run = few_run(steps=2, **CRITIC_RUN | {"objective": DRPO(0.2)})
    train(run, tmp_path)
    records = read_records(tmp_path / ROLLOUTS)
    for step, update, figures in (
        (m["step"], i, u) for m in read_records(tmp_path / METRICS) for i, u in enumerate(m["updates"])
    ):
        of_one = [r for r in records if (r["step"], r["update"]) == (step, update)]
        assert all("logp" in r for r in of_one)
        tokens = tokens_of(trained_rows(of_one, "episode"))
        weight = gradient_weight(run.objective.loss, tokens)
        assert float(weight.double().mean()) == pytest.approx(figures["weight_mean"])
        assert float(weight.min()) == figures["weight_min"]
    differing = [r for r in records if "advantages" in r]
    assert differing and all(len(set(r["advantages"])) > 1 for r in differing)
    for r in differing:
        assert sum(r["advantages"]) / len(r["advantages"]) == pytest.approx(r["advantage"], abs=1e-6)
    columns = trained_columns(read_rollouts(tmp_path, run.objective.loss, most_tokens=10**6))
    assert columns["advantage"].tolist() == tokens_of(trained_rows(records, "episode")).advantage.tolist()
    replayed = recorded(tmp_path, step=2)
    last = [a for r in records if r["step"] == 2 for a in r.get("advantages", [r["advantage"]] * len(r["token_ids"]))]
    assert replayed.tokens.advantage.tolist() == last
    assert write_report(tmp_path, run).stat().st_size > 0
    every = torch.tensor(last)
    assert float(every.mean()) == pytest.approx(0, abs=1e-5) and float(every.std(correction=0)) == pytest.approx(1)


# ---- configuration ----


def test_a_critics_spec_round_trip():
    for critic in (GAE(), GAE(lam=0.9, clip=None), GAE(0.99, 1.0, 0.1, 2, 4, False)):
        assert parse_spec(format_spec(critic, REGISTRY), REGISTRY) == critic
        run = configure(Run(), critic=critic)
        assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert from_json(to_json(Run())).objective.critic is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gae(1.5)", "gamma=1.5"),
        ("gae(1.0, -0.1)", "lam=-0.1"),
        ("gae('x')", "gamma='x'"),
        ("gae(lam=nan)", "not of the form"),
        ("gae(clip=0)", "clip=0"),
        ("gae(updates=0)", "updates=0"),
        ("gae(updates=1.5)", "updates=1.5"),
        ("gae(warmup=-1)", "warmup=-1"),
        ("gae(whiten=2)", "whiten=2"),
        ("gea", "did you mean 'gae'"),
        ("fractions:Fraction(3, 4)", "write gae"),
    ],
)
def test_a_critic_that_cannot_be_is_refused_by_name(text: str, said: str):
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        configure(Run(), critic=read_value("critic", text))
    assert "\n" not in str(caught.value)


def test_what_a_critic_changes_in_what_a_run_may_be():
    with pytest.raises(InputError, match=r"sampling\.samples=1: .* needs at least 2, or a critic"):
        configure(Run(), sampling=Sampling(samples=1))
    assert configure(Run(), sampling=Sampling(samples=1), critic=GAE()).objective.critic == GAE()


@pytest.mark.slow
def test_ppo_with_a_critic_learns_the_demo(tmp_path: Path):
    given_ = ["--objective", "ppo(0.2, 0.2)", "--critic", "gae(1.0, 0.95)", "--critic-optimizer", "adamw(5e-5)"]
    assert cli.main(["train", "demo", *given_, "--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["evaluation_after"]["low"] > summary["evaluation_before"]["high"]
