"""Routing replay: a mixture is told which experts to use, weighs them itself, and trains as if it had chosen them.

Not covered: GPUs; what vLLM reports (test_reported_routes.py, test_vllm.py).
"""

import json
import signal
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import JetMoeConfig, JetMoeForCausalLM, PreTrainedModel

from drpo.errors import InputError
from drpo.model.policy import Policy
from drpo.model.precision import FP32, Precision
from drpo.model.quantize import stacked_experts
from drpo.model.routing import RouteRecorder, routing_mismatch
from drpo.model.routing_replay import RoutingReplay
from drpo.objectives import DRPO
from drpo.rollout import TransformersEngine
from drpo.rollout.routes import joined
from drpo.rollout.trial import Way
from drpo.train.config import configure
from drpo.train.log import episode_of, in_flight_record
from drpo.train.loop import train
from drpo.train.metrics import routing_metrics
from drpo.train.optim import AdamW
from drpo.train.records import METRICS, read_records
from drpo.train.routing import FirstPass
from drpo.train.setup import build
from drpo.types import Episode, MicroBatch, Request, Routes, Sampling
from drpo.types.routes import compact, known, none_chosen
from support.architectures import FAMILIES, mixture, settings
from support.families import build as build_family
from support.forks import KillItself, fork
from support.mixtures import MIXTURES, chosen, fresh, in_groups, states
from support.rollouts import transformers_engine
from support.runs import assert_same_run
from support.tiny_world import PROBLEMS, REWARDS, batched, completion, grouped, how, perturb, tiny, with_sequence
from support.worlds import sampling, tiny_run

FP8 = Precision(torch.float32, "e4m3", "e4m3")
HAND_MADE = [
    completion(range(60 + 9 * i, 70 + 11 * i), prompt_ids=PROMPT, problem="p0" if i < 2 else "p1", sample=i % 2)
    for i, PROMPT in enumerate([(5, 6, 7), (5, 6, 7), (9, 8, 7, 6, 4), (9, 8, 7, 6, 4)])
]
IDS = torch.tensor([5, 9, 77, 31, 200, 8, 8, 64])


def rollout(model: PreTrainedModel, precision: Precision = FP32, samples: int = 4) -> list[Episode]:
    engine = transformers_engine(model, precision=precision, routes=True)
    return engine.generate(PROBLEMS, Sampling(samples=samples, max_new_tokens=12), (0,))


def without(episodes: Sequence[Episode]) -> list[Episode]:
    return [with_sequence(e, routes=None) for e in episodes]


def micros(episodes: Sequence[Episode], policy: Policy, tokens: int = 200) -> list[MicroBatch]:
    config = how(share_prompts=policy.shares_prompts, micro_batch_tokens=tokens)
    rewards = REWARDS if len(episodes) == sum(map(len, REWARDS)) else ((1.0, 0.0), (0.0, 1.0))
    return list(batched(grouped(episodes, rewards), config)[0].micro_batches)


def trained(policy: Policy, batch: Sequence[MicroBatch]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each micro-batch's log-probabilities, and the gradients of the whole."""
    policy.model.zero_grad()
    logps = []
    for micro in batch:
        result = policy.loss(micro, DRPO(0.2))
        result.loss.backward()
        logps.append(result.logp)
    return logps, {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}


def assert_same(one: tuple[list[Tensor], dict], other: tuple[list[Tensor], dict]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1].keys() == other[1].keys() and all(torch.equal(g, other[1][n]) for n, g in one[1].items())


def k3(logps: Sequence[Tensor], batch: Sequence[MicroBatch]) -> float:
    log_r = torch.cat(list(logps)) - torch.cat([m.behavior_logp for m in batch])
    return float((log_r.exp() - 1 - log_r).mean())


# ---- what a router is told ----


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_does_what_it_is_told(name: str) -> None:
    model = fresh(name)
    own, before = chosen(model, IDS), states(model, IDS)
    replay = RoutingReplay(model)
    replay.check(model)
    assert torch.equal(states(model, IDS, routes=own), before) and not replay.differs.any()
    other = own.flip(0)
    assert torch.equal(chosen(model, IDS, routes=other), other)
    assert replay.differs.tolist() == (other.sort(-1).values != own.sort(-1).values).flatten(1).any(1).tolist()
    assert torch.equal(states(model, IDS), before)  # a pass that is told nothing chooses itself


REPLAYED = """
afmoe aria_text axk1 axk2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo
glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe
hy_v3 hy_v4 jamba laguna mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe qwen2_moe
qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next lfm2_moe solar_open
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", [*REPLAYED.split(), "gemma4, experts"])
def test_families_of_mixtures_pass_the_self_check(family: str) -> None:
    """Also in the rows that the trainer computes: told its own choices, no bit changes."""
    policy = Policy(build_family(family), precision=FP32, temperature=1.0, replays=True)
    micro = micros(without(HAND_MADE), policy)[0]
    told = replace(micro, routes=policy.routes(micro))
    with torch.no_grad():
        assert torch.equal(policy(micro)[0], policy(told)[0])
        other = replace(micro, routes=told.routes.roll(1, 0))
        assert not torch.equal(policy(micro)[0], policy(other)[0]) and policy.routing_metrics(other)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["phimoe", "jetmoe", "llama4_text"])
def test_families_of_mixtures_that_do_not_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"routing_replay: .*set --routing-replay off"):
        RoutingReplay(build_family(family))


def test_tables_of_an_encoder_of_images_are_no_experts() -> None:
    """Gemma 4's has one [2, positions, width] beside its language model, with experts (26B-A4B) and without."""
    names = {name for name, _, _ in stacked_experts(build_family("gemma4, experts"))}
    assert names == {f"model.language_model.layers.{i}.experts" for i in range(2)}
    assert not any(stacked_experts(build_family("gemma4")))
    Policy(build_family("gemma4, experts"), precision=FP32, temperature=1.0, replays=True)


def test_weights_are_the_trainers_own_by_hand() -> None:
    """Qwen3: softmax over all experts, of which those told are taken and divided by their sum."""
    model = mixture()
    block = model.model.layers[1].mlp
    inputs, handed = [], []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.experts.register_forward_pre_hook(lambda _, args: handed.append(args[1:]))
    RoutingReplay(model)
    told = torch.tensor([[[0, 1], [7, 2]]] * 8, dtype=torch.uint8)
    states(model, IDS, routes=told)
    p = torch.softmax(inputs[-1][0] @ block.gate.weight.T, -1)[:, [7, 2]]
    choice, weights = handed[-1]
    assert choice.tolist() == [[7, 2]] * 8
    torch.testing.assert_close(weights, p / p.sum(-1, keepdim=True), rtol=0, atol=1e-6)


def test_groups_of_experts_follow_those_that_are_told() -> None:
    model = in_groups()
    own = chosen(model, IDS)
    assert ((own < 4).all(-1) | (own >= 4).all(-1)).all()
    weights = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: weights.append(args[2]))
    RoutingReplay(model)
    told = (own + 4) % 8  # of the group that was not taken
    assert torch.equal(chosen(model, IDS, routes=told), told) and (weights[-1] > 0).all()


def test_what_is_missing_is_the_trainers_own() -> None:
    model = mixture()
    own = chosen(model, IDS)
    RoutingReplay(model)
    told = own.flip(0)
    told[2:5] = none_chosen(3, told)
    handed = chosen(model, IDS, routes=told)
    assert torch.equal(handed[:2], told[:2]) and torch.equal(handed[2:5, 0], own[2:5, 0])  # a later layer's have moved


def test_a_layer_computed_again_in_the_backward_pass_is_told_the_same() -> None:
    """Activations that are not kept: gradients are those of kept ones, though another micro-batch follows."""
    policy = Policy(perturb(mixture(), 0.1), precision=FP32, temperature=1.0, replays=True)
    batch = micros(rollout(policy.model, FP8), policy)
    expected = trained(policy, batch)
    for layer in policy.model.model.layers:
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    assert_same(trained(policy, batch), expected)


# ---- what a sampler reports ----


@pytest.mark.parametrize(("grouped_rows", "begin"), [(True, False), (False, False), (True, True)])
def test_the_sampler_reports_what_it_chose(grouped_rows: bool, begin: bool) -> None:
    """As one pass over each whole text chooses, also where rows end at different times."""
    model = perturb(mixture(), 0.1)
    engine = TransformersEngine(model, routes=True)
    engine.way = Way.GROUPED if grouped_rows else Way.PLAIN
    stop = frozenset(range(0, 257, 9))
    before = torch.arange(40) if begin else IDS[:0]  # long enough to be read once for all
    prompts = [torch.cat([before, IDS[:p]]) for p in (3, 8, 5)]
    requests = [Request(p, Sampling(max_new_tokens=12), stop, (0, len(p), i)) for p in prompts for i in range(3)]
    generations = engine.generate(requests)
    assert len({len(g.token_ids) for g in generations}) > 2 and bool(engine._shares_prefix) == begin
    assert engine.way is (Way.GROUPED if grouped_rows else Way.PLAIN)
    for request, g in zip(requests, generations, strict=True):
        routes = torch.cat([g.routes.prompt, g.routes.tokens])
        expected = chosen(model, torch.cat([request.prompt_ids, g.token_ids]))
        assert torch.equal(routes[:-1], expected[:-1]) and not known(routes[-1:]).any()
    shared = {id(g.routes.prompt) for g in generations}
    assert len(shared) == 3  # a prompt's choices are there once


@pytest.mark.parametrize("kept_bytes", [2**30, 0])
def test_later_turns_fill_in_what_they_read(kept_bytes: int) -> None:
    """The turn's last token, and what followed it; a row that goes on reads nothing twice."""
    model = perturb(FAMILIES["mixtral, experts"]().eval(), 0.1)
    engine = TransformersEngine(model, routes=True, kept_bytes=kept_bytes)
    first, last = Request(IDS, Sampling(max_new_tokens=5), frozenset(range(200)), (0,), goes_on=True), IDS[:4] + 1
    one = engine.generate([first])[0]
    context = torch.cat([IDS, one.token_ids, last])
    two = engine.generate([replace(first, prompt_ids=context, after=one, goes_on=False)])[0]
    assert known(two.routes.prompt).sum() == (len(last) + 1 if kept_bytes else len(context))
    routes = joined(len(IDS), [one, last, two])
    expected = chosen(model, torch.cat([context, two.token_ids]))
    assert torch.equal(torch.cat([routes.prompt, routes.tokens])[:-1], expected[:-1])
    assert not known(joined(len(IDS), [one]).tokens)[-1]


def test_records_in_flight_keep_routes() -> None:
    (e, *_) = rollout(mixture())
    again = episode_of(json.loads(json.dumps(in_flight_record(e))), e.sampling).sequence.routes
    assert again.tokens.dtype == torch.uint8 and torch.equal(again.tokens, e.sequence.routes.tokens)
    assert torch.equal(again.prompt, e.sequence.routes.prompt)
    assert compact(254) == torch.uint8 and compact(255) == torch.int16


# ---- training ----


@pytest.mark.parametrize(
    ("name", "rank"), [("qwen3", 0), pytest.param("qwen3", 2, marks=pytest.mark.slow), ("padded", 0)]
)
def test_with_equal_weights_and_precision_nothing_changes(name: str, rank: int) -> None:
    """Loss and gradients, bit for bit: packed rows of shared prompts, adapters, padded rows."""
    model = perturb(mixture(), 0.1)
    episodes = rollout(model)
    policy = Policy(model, precision=FP32, temperature=1.0, replays=True, lora_rank=rank)
    policy.shares_prompts = name != "padded"
    batch = micros(episodes, policy)
    assert all(known(m.routes).all() for m in batch) and len(batch) > 1
    assert_same(trained(policy, batch), trained(policy, micros(without(episodes), policy)))
    assert not any(policy.routing_metrics(m)["routing_replaced"].any() for m in batch[-1:])


@pytest.mark.parametrize("shares", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_replay_cures_the_mismatch_of_an_8_bit_sampler(shares: bool) -> None:
    model = perturb(mixture(), 0.1)
    episodes = rollout(model, FP8, samples=4)
    policy = Policy(model, precision=FP32, temperature=1.0, replays=True)
    policy.shares_prompts = shares
    told, free = micros(episodes, policy), micros(without(episodes), policy)
    (before, _), (after, _) = trained(policy, free), trained(policy, told)
    assert k3(after, told) < k3(before, free) / 2
    with torch.no_grad():
        policy(told[0])
        replaced = policy.routing_metrics(told[0])["routing_replaced"]
    assert 0 < replaced.mean() < 1 and replaced.shape == told[0].target.shape


def dropped(episodes: Sequence[Episode], shares: bool) -> tuple[dict[str, int], int]:
    """The metrics of one batch, and the positions that prompts have in it."""
    (batch,) = batched(grouped(episodes, REWARDS), how(share_prompts=shares, micro_batch_tokens=10_000))
    rows = [batch.credits[n].sequence for m in batch.micro_batches for n in m.row.unique().tolist()]
    lengths = [tuple(s.prompt_ids.tolist()) for s in rows]
    return routing_metrics([batch]), sum(map(len, set(lengths) if shares else lengths))


@pytest.mark.parametrize("shares", [True, False])
def test_positions_without_a_choice_are_counted(shares: bool) -> None:
    """A prompt that a cache had: once where the group shares it, else in each row; padding is no position."""
    episodes = rollout(mixture())
    hidden = [
        with_sequence(e, routes=Routes(none_chosen(len(r.prompt), r.prompt), r.tokens))
        for e in episodes
        if (r := e.sequence.routes)
    ]
    counts, positions = dropped(hidden, shares)
    assert counts == {"routing_missing": positions, "routing_conflicts": 0}
    assert dropped(episodes, shares)[0] == {"routing_missing": 0, "routing_conflicts": 0}
    some = [h if h.sample == 0 else e for h, e in zip(hidden, episodes, strict=True)]
    missing = dropped(some, shares)[0]["routing_missing"]  # where the group shares it, another row has the prompt's
    assert missing == 0 if shares else 0 < missing < positions


@pytest.mark.parametrize("shares", [True, False])
def test_choices_that_a_shared_prompt_has_no_room_for_are_counted(shares: bool) -> None:
    """An engine may read a prompt anew for each sample, and choose otherwise; order among the k means nothing."""
    episodes = rollout(mixture())
    longest = max(episodes, key=lambda e: len(e.sequence.prompt_ids))
    first = longest.sequence.routes
    assert first is not None
    moved = (first.prompt + 1) % 8
    moved[0] = first.prompt[0].flip(-1)
    again = [
        with_sequence(e, routes=Routes(moved, r.tokens))
        if (e.problem_id, e.sample) == (longest.problem_id, 2) and (r := e.sequence.routes)
        else e
        for e in episodes
    ]
    counts, _ = dropped(again, shares)
    differing = (moved.sort(-1).values != first.prompt.sort(-1).values).flatten(1).any(1)
    assert 0 < differing.sum() < len(moved)
    assert counts == {"routing_missing": 0, "routing_conflicts": int(differing.sum()) if shares else 0}


def test_the_first_pass_holds_in_later_updates() -> None:
    """The trainer's own choice before the updates is what its experts are handed after the weights have moved."""
    policy = Policy(perturb(mixture(), 0.1), precision=Precision(torch.bfloat16), temperature=1.0, replays=True)
    groups = grouped(without(rollout(policy.model)), REWARDS)
    with_own = FirstPass(policy, micro_batch_tokens=200).add_to(groups)
    batch = micros([e for g in with_own for e in g.episodes], policy)
    assert all(known(m.routes).all() for m in batch)
    expected = {id(m): policy.routes(m) for m in batch}
    assert all(torch.equal(m.routes, expected[id(m)]) for m in batch)
    perturb(policy.model, 0.2)
    assert not all(torch.equal(m.routes, policy.routes(m)) for m in batch)
    recorder = RouteRecorder(policy.model)
    with recorder.listening(), torch.no_grad():
        policy(batch[0])
        assert torch.equal(recorder.take(1)[0], batch[0].routes)


@pytest.mark.parametrize(("replay", "updates"), [("sampler", 1), pytest.param("trainer", 2, marks=pytest.mark.slow)])
def test_a_run_replays(tmp_path, replay: str, updates: int) -> None:
    perturb(mixture(), 0.1).save_pretrained(tmp_path / "mixture")
    tiny()[1].save_pretrained(tmp_path / "mixture")
    run = tiny_run(
        model=str(tmp_path / "mixture"), steps=1, prompts=2, updates=updates, sampling=sampling(samples=4),
        precision="fp32", rollout_precision="fp8", routing_replay=replay, optimizer=AdamW(1e-2),
    )  # fmt: skip
    train(run, tmp_path / "run")
    (metrics,) = read_records(tmp_path / "run" / METRICS)
    assert metrics["routing_missing"] == 0 and metrics["trained_tokens"] > 0
    assert 0 < metrics["routing_replaced"] < 1
    told = build(run).driver.run(run.data.task.sample(1, 0, 0), run.rollout.sampling, (0, 0))[0][0].sequence.routes
    assert (told is not None) == (replay == "sampler")


@pytest.mark.slow
def test_killed_and_resumed_is_one_run_bit_for_bit(one_thread: None, tmp_path) -> None:
    """Rollouts in flight come back with their routes; without these the resumed update would choose otherwise."""
    perturb(mixture(), 0.1).save_pretrained(tmp_path / "mixture")
    tiny()[1].save_pretrained(tmp_path / "mixture")
    run = tiny_run(
        model=str(tmp_path / "mixture"), steps=3, prompts=2, updates=1, sampling=sampling(samples=4), async_steps=1,
        precision="fp32", rollout_precision="fp8", routing_replay="sampler", optimizer=AdamW(1e-2), checkpoint_every=2,
    )  # fmt: skip
    train(run, tmp_path / "whole")
    killed = fork(tmp_path / "out", train, run, tmp_path / "killed", KillItself(2, "update"))
    assert killed.end()[0] == -signal.SIGKILL
    assert train(run, tmp_path / "killed")["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    counts = [m.get("routing_missing") for m in read_records(tmp_path / "killed" / METRICS)]
    assert set(counts) <= {0, None} and 0 in counts  # a step that trains nothing has no count


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(routing_replay="trainer", updates=1), "routing_replay=trainer: with updates=1"),
        (dict(routing_replay="smapler"), "routing_replay='smapler'"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_a_model_loads(changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        configure(tiny_run(), **changes)
    assert "\n" not in str(error.value)


def test_models_without_a_choice_to_replay_are_refused() -> None:
    jet = JetMoeForCausalLM(JetMoeConfig(**settings(num_local_experts=4, num_experts_per_tok=2, kv_channels=8)))
    for model, said in ((jet.eval(), "JetMoeForCausalLM"), (tiny()[0], "has no experts")):
        with pytest.raises(InputError, match=f"routing_replay: .*{said}.*set --routing-replay off") as error:
            Policy(model, precision=FP32, temperature=1.0, replays=True)
        assert "\n" not in str(error.value)
    policy = Policy(mixture(), precision=FP32, temperature=1.0, replays=True)
    with pytest.raises(InputError, match="reports 3 layers with 2 experts to a token, the model in training has 2"):
        policy.replay.require(torch.zeros(4, 3, 2, dtype=torch.uint8))


@pytest.mark.slow
def test_mismatch_measures_what_replay_cures() -> None:
    """The doctor's figure, of the same rollout: the share that the metric says was replaced."""
    model = perturb(mixture(), 0.1)
    engine = transformers_engine(model, precision=FP8, routes=True)
    episodes = engine.generate(PROBLEMS, Sampling(samples=4, max_new_tokens=24), (0,))
    policy = Policy(model, precision=FP32, temperature=1.0, replays=True)
    found = routing_mismatch(engine.model, policy.model, [e.sequence for e in episodes])
    batch = micros(episodes, policy, tokens=10_000)
    replaced = []
    for micro in batch:
        with torch.no_grad():
            policy(micro)
        replaced.append(policy.routing_metrics(micro)["routing_replaced"])
    assert float(torch.cat(replaced).mean()) == pytest.approx(found.share_of_tokens, abs=0.1)
