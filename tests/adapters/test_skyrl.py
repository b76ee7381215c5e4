"""drpo inside SkyRL, on a CPU: registry, validation, the worker's code, Ray, and the entry point up to the model.

Not covered: FSDP and Megatron, several ranks, vLLM. SkyRL's workers need CUDA; here a CPU takes its place.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.cases import OF_2026, SEQUENCE, SPECS, Rows, direct_gradient, rows
from adapters.episodes import Padded, require_masks
from adapters.pages import PAGES, run_page
from adapters.parity import record
from drpo.autopsy.formats import format_of
from drpo.errors import InputError
from drpo.reductions import Horizon, sequence_mean, token_mean

pytest.importorskip("skyrl", reason="SkyRL is not installed; `make test-skyrl` installs it in .adapters/skyrl")
pytestmark = pytest.mark.adapters

import ray  # noqa: E402
from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: E402
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
    sync_registries,
)
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase  # noqa: E402
from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors  # noqa: E402
from skyrl.train.dataset.replay_buffer import Experience  # noqa: E402
from skyrl.train.generators.skyrl_gym_generator import TurnOutput  # noqa: E402
from skyrl.train.trainer import RayPPOTrainer  # noqa: E402
from skyrl.train.utils import validate_cfg  # noqa: E402

from drpo.adapters import skyrl  # noqa: E402

VERSION = metadata.version("skyrl")
SINCE_0_4 = "rollout_expert_indices" not in {field.name for field in fields(TurnOutput)}
MASK_FIELD = "response_mask" if SINCE_0_4 else "action_mask"  # of SkyRL's Experience
MAX_SEQ_LEN = 16
PROMPTS = [(0, 2), (2, 4)]
MICRO = 2
CONSOLE = "trainer.logger=console"


def configured(*words: str, objective: str = "drpo(0.2)") -> Any:
    return skyrl.DrpoTrainConfig.from_cli_overrides([f"{skyrl.FIELD}={objective}", CONSOLE, *words])


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """SkyRL's registry, before and after, without our loss."""

    def clear() -> None:
        if skyrl.NAME in PolicyLossRegistry.list_available():
            PolicyLossRegistry.unregister(skyrl.NAME)

    clear()
    yield
    clear()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of one core on this machine's own address."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        yield
    finally:
        PolicyLossRegistry.reset()
        ray.shutdown()


def counted(batch: Rows, reduction: str) -> Tensor:
    """What each token counts in SkyRL's mini-batch loss, [B, T], written down from its names."""
    keep = batch.keep.double()
    per_row, n_rows = keep.sum(1, keepdim=True), len(keep)
    if reduction == "token_mean":
        return torch.full_like(keep, 1 / keep.sum().item())
    if reduction == "sequence_mean":
        return (1 / (n_rows * per_row)).expand_as(keep)
    if reduction == "seq_mean_token_sum_norm":
        return torch.full_like(keep, 1 / (n_rows * MAX_SEQ_LEN))
    groups = PROMPTS if reduction == "prompt_mean" else [(i, i + MICRO) for i in range(0, n_rows, MICRO)]
    parts = [torch.full_like(keep[a:b], 1 / (len(groups) * keep[a:b].sum().item())) for a, b in groups]
    return torch.cat(parts)


def scaled_advantages(batch: Rows, reduction: str) -> Tensor:
    """Advantages as SkyRL's trainer stores them."""
    spread = batch.advantage.unsqueeze(1).expand(batch.logp.shape)
    return apply_loss_reduction_to_advantages_minibatch(
        spread, batch.keep.to(spread.dtype), reduction, MICRO, MAX_SEQ_LEN, PROMPTS
    )


REDUCTIONS = ("token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("spec", [spec for spec in (*SPECS, *OF_2026, SEQUENCE) if "k2" not in spec])
def test_gradient_through_the_registry(spec: str, reduction: str):
    skyrl.register()
    loss_of = PolicyLossRegistry.get(skyrl.NAME)
    config = configured(objective=spec).trainer.algorithm
    worst = 0.0
    for seed in range(8):
        batch = rows(seed)
        advantages, mask = scaled_advantages(batch, reduction), batch.keep.long()
        logp = batch.logp.clone().requires_grad_()
        for a in range(0, len(logp), MICRO):
            part = slice(a, a + MICRO)
            loss, _ = loss_of(
                logp[part], None, advantages[part], config=config, loss_mask=mask[part],
                rollout_logprobs=batch.behavior_logp[part],
            )  # fmt: skip
            loss.backward()
        wanted = direct_gradient(spec, batch, counted(batch, reduction))
        worst = max(worst, (logp.grad.double() - wanted).abs().max().item())
    record(f"SkyRL, loss_reduction={reduction}", VERSION, spec, worst)
    assert worst < 1e-6


def worker(cfg: Any, logp: Tensor) -> PolicyWorkerBase:
    """SkyRL's policy worker with a table of log-probabilities for a model; its own code calls the loss."""
    made = object.__new__(PolicyWorkerBase)
    made.cfg, made.optimizer = cfg.trainer, None
    made.model = torch.nn.Module()
    made.model.forward = lambda *_, **__: (logp, {"entropy": torch.zeros(len(logp), logp.shape[1] + 1)})
    made.strategy = SimpleNamespace(backward=lambda loss, *_: loss.backward())
    made.mesh_rank = SimpleNamespace(dp_size=1)
    made.scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    made.policy_loss_fn = PolicyLossRegistry.get(cfg.trainer.algorithm.policy_loss_type)
    return made


def experience(batch: Rows, advantages: Tensor, sampler: Tensor | None) -> Experience:
    n_rows, length = batch.logp.shape
    whole = torch.ones(n_rows, length + 1, dtype=torch.long)
    return Experience(
        sequences=whole, action_log_probs=None, base_action_log_probs=None, values=None, returns=None,
        advantages=advantages, attention_mask=whole, loss_mask=batch.keep.long(), rollout_logprobs=sampler,
        rollout_expert_indices=None, num_actions=length, info=None, **{MASK_FIELD: batch.keep.long()},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_skyrls_own_worker_calls_the_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    skyrl.register()
    cfg, batch = configured("trainer.algorithm.use_kl_loss=false"), rows(2)
    logp = batch.logp.clone().requires_grad_()
    advantages = scaled_advantages(batch, "token_mean")
    status = worker(cfg, logp)._forward_backward_micro(experience(batch, advantages, batch.behavior_logp), 1.0)
    wanted = direct_gradient("drpo(0.2)", batch, counted(batch, "token_mean"))
    assert (logp.grad.double() - wanted).abs().max() < 1e-6
    moved = (batch.logp.exp() - batch.behavior_logp.exp()).abs()[batch.keep]
    assert status["loss_metrics/drpo/prob_diff_max"] == pytest.approx(moved.max().item())
    assert {f"loss_metrics/drpo/{n}" for n in ("prob_diff_mean", "out_of_region", "weight_min", "unscored")} <= set(
        status
    )
    with pytest.raises(InputError, match=r"generator\.sampling_params\.logprobs=null: .* set it to 1"):
        worker(cfg, logp)._forward_backward_micro(experience(batch, advantages, None), 1.0)


def test_metrics_keep_the_ends_of_what_micro_batches_saw():
    """SkyRL goes by the end of a name: _max and _min are not averaged."""
    from skyrl.backends.skyrl_train.workers.worker_utils import reduce_metrics

    seen = reduce_metrics({"loss_metrics/drpo/prob_diff_max": [0.1, 0.5], "loss_metrics/drpo/weight_min": [0.2, -1.0]})
    assert seen == {"loss_metrics/drpo/prob_diff_max": 0.5, "loss_metrics/drpo/weight_min": -1.0}


@pytest.mark.parametrize("junk", [math.nan, 7.0])
def test_padding_has_no_effect(junk: float):
    skyrl.register()
    loss_of, config = PolicyLossRegistry.get(skyrl.NAME), configured().trainer.algorithm
    batch, found = rows(3), []
    for fill in (0.0, junk):
        logp = torch.where(batch.keep, batch.logp, -1.0 if fill == 0 else fill).requires_grad_()
        sampler = torch.where(batch.keep, batch.behavior_logp, fill)
        loss, seen = loss_of(logp, None, scaled_advantages(batch, "token_mean"), config, batch.keep.long(), sampler)
        loss.backward()
        found.append((loss.item(), logp.grad.tolist(), seen))
    assert found[0] == found[1]


AVERAGES = {"token_mean": token_mean, "sequence_mean": sequence_mean, "seq_mean_token_sum_norm": Horizon(MAX_SEQ_LEN)}
"""SkyRL's `loss_reduction` -> our reduction that averages in the same way."""


def in_skyrl(spec: str, batch: Padded, reduction: str) -> tuple[Tensor, dict[str, float]]:
    """SkyRL-gym's episodes: laid out, averaged and reduced by SkyRL, in micro-batches of two.

    SkyRL-gym writes mask and log-probability 0 for what the environment says (`TurnOutput`), and SkyRL puts the
    padding before the tokens.
    """
    ends = batch.inside.sum(1).tolist()
    response, mask, sampler = (
        [row[:n].tolist() for row, n in zip(column, ends, strict=True)]
        for column in (batch.target, batch.keep.long(), batch.behavior_logp)
    )
    rewards = [[0.0] * n for n in ends]
    pad = 0 if SINCE_0_4 else SimpleNamespace(pad_token_id=0)
    columns = convert_prompts_responses_to_batch_tensors(pad, [[1]] * len(ends), response, rewards, mask, sampler)
    masks, scores = columns[4:6]

    def right(column: Tensor) -> Tensor:
        return torch.stack([torch.cat([row[n:], row[:n]]) for row, n in zip(column, ends, strict=True)])

    advantages = apply_loss_reduction_to_advantages_minibatch(
        right(batch.advantage), masks, reduction, MICRO, MAX_SEQ_LEN, PROMPTS
    )
    loss_of, config = PolicyLossRegistry.get(skyrl.NAME), configured(objective=spec).trainer.algorithm
    logp, losses, shown = right(batch.logp), [], {}
    for a in range(0, len(logp), MICRO):
        part = slice(a, a + MICRO)
        loss, seen = loss_of(
            logp[part], None, advantages[part], config=config, loss_mask=masks[part], rollout_logprobs=scores[part]
        )
        losses.append(loss)
        shown |= {f"{name} {a}": value for name, value in seen.items()}
    return torch.stack(losses).sum(), shown


@pytest.mark.parametrize("spec", [spec for spec in (*SPECS, *OF_2026, SEQUENCE) if "k2" not in spec])
def test_tokens_of_environments_have_no_part_in_skyrls_loss(spec: str):
    skyrl.register()
    each = [require_masks(partial(in_skyrl, reduction=how), spec, reduction=ours) for how, ours in AVERAGES.items()]
    record("SkyRL, turns of SkyRL-gym", VERSION, spec, max(each))


def test_skyrl_gym_marks_what_the_environment_said():
    named = {"output": "", "new_obs": [], "reward": None} | ({} if SINCE_0_4 else {"rollout_expert_indices": None})
    turn = TurnOutput(output_ids=[5, 6], output_logprobs=[-1.0, -2.0], obs_ids=[7, 8, 9], **named)
    assert turn.get_turn_loss_mask() == [1, 1, 0, 0, 0]
    assert turn.get_turn_rollout_logprobs() == [-1.0, -2.0, 0.0, 0.0, 0.0]
    stopped = TurnOutput(output_ids=[5, 1], output_logprobs=[-1.0, 0.0], obs_ids=[7], added_eos=True, **named)
    assert stopped.get_turn_loss_mask() == [1, 0, 0]


def test_what_skyrls_trainer_dumps_is_read(tmp_path: Path):
    """By SkyRL's own code from its generator's output on; since 0.4 a batch may have routed experts and kept tokens."""
    sizes = ("train_batch_size=2", "policy_mini_batch_size=2", "algorithm.grpo_norm_by_std=false")
    words = [f"trainer.{word}" for word in (*sizes, f"export_path={tmp_path}")]
    cfg = configured(*words, "generator.n_samples_per_prompt=2")
    trainer = SimpleNamespace(
        cfg=cfg, tokenizer=SimpleNamespace(pad_token_id=0), all_metrics={}, reward_kl_controller=None,
        dispatch=SimpleNamespace(get_lcm_dp_size=lambda: 3),  # pads the four rows to six
    )  # fmt: skip
    ids, uids = [[5, 6, 7], [5, 8], [9, 7], [4, 7, 7]], ["a", "a", "b", "b"]
    mu, mask = [[-0.5 - i - j for j in range(len(row))] for i, row in enumerate(ids)], [[1] * len(row) for row in ids]
    mask[0][1] = 0  # an environment's
    output = {
        "prompt_token_ids": [[1, 2], [1, 2], [3], [3]], "response_ids": ids, "loss_masks": mask, "rollout_logprobs": mu,
        "rewards": [[0.0] * (len(row) - 1) + [float(i == 0)] for i, row in enumerate(ids)],
    }  # fmt: skip
    if SINCE_0_4:
        rows_of = [len(prompt) + len(row) for prompt, row in zip(output["prompt_token_ids"], ids, strict=True)]
        output["rollout_expert_indices"] = [np.zeros((n, 2, 1), np.int16) for n in rows_of]
        output["rollout_sample_support"] = [np.full((len(row), 2), 7, np.int32) for row in ids]
    batch = RayPPOTrainer.convert_to_training_input(trainer, output, uids)
    assert not SINCE_0_4 or None not in (batch["rollout_expert_indices"], batch["rollout_sample_support"])
    batch["values"], batch["base_action_log_probs"] = None, None
    batch["action_log_probs"] = (batch["rollout_logprobs"] - 0.25).bfloat16()
    batch = RayPPOTrainer.compute_advantages_and_returns(trainer, batch)
    batch.pop("rewards")
    batch.metadata.pop("uids")
    RayPPOTrainer.dump_data(trainer, batch, "global_step_3_training_input")

    (path,) = (tmp_path / "dumped_data").iterdir()
    form = format_of(path)
    assert form is not None and form.name == "SkyRL"
    read = list(form.read(path))
    ids[0], mu[0] = [5, 7], [-0.5, -2.5]  # without the environment's
    assert [r.token_ids.tolist() for r in read] == ids
    assert [r.behavior_logp.tolist() for r in read] == mu
    assert [r.logp.tolist() for r in read] == [(r.behavior_logp - 0.25).tolist() for r in read]
    assert [float(r.advantages[0]) for r in read] == [0.5, -0.5, 0.0, 0.0]
    assert {(r.step, r.reward_mean) for r in read} == {(3, 0.25)}
    assert [r.group == read[0].group for r in read] == [True, True, False, False]


def test_validation_knows_the_loss_once_it_is_registered():
    with pytest.raises(AssertionError, match="invalid policy_loss_type: drpo"):
        validate_cfg(configured())
    skyrl.register()
    skyrl.register()
    validate_cfg(configured())
    skyrl.check(configured())


def test_old_logprobs_are_not_computed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(skyrl.trainer, "LOSSES_WITHOUT_OLD_LOGPROBS", skyrl.trainer.LOSSES_WITHOUT_OLD_LOGPROBS)
    own, batch = SimpleNamespace(cfg=configured()), {"rollout_logprobs": torch.zeros(1)}
    assert not RayPPOTrainer._skip_policy_forward(own, batch)
    skyrl.skip_old_logprobs()
    skyrl.skip_old_logprobs()
    assert RayPPOTrainer._skip_policy_forward(own, batch)
    assert not RayPPOTrainer._skip_policy_forward(own, {})


def test_the_task_tells_the_trainer_before_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(skyrl.trainer, "LOSSES_WITHOUT_OLD_LOGPROBS", frozenset())
    monkeypatch.setattr(RayPPOTrainer, "_execute_training_step", RayPPOTrainer._execute_training_step)
    seen: list[Any] = []

    class Experiment:
        def __init__(self, cfg: Any):
            seen.append((cfg, skyrl.trainer.LOSSES_WITHOUT_OLD_LOGPROBS))

        def run(self) -> None:
            seen.append("ran")

    monkeypatch.setattr(skyrl, "BasePPOExp", Experiment)
    cfg = configured()
    skyrl.run(cfg)
    assert seen == [(cfg, {"drpo"}), "ran"]


def test_a_step_whose_loss_is_another_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def step(self: Any, model: str, data: Any) -> dict[str, float]:
        return data

    monkeypatch.setattr(RayPPOTrainer, "_execute_training_step", step)
    skyrl.check_steps(skyrl.objective_of("drpo(0.2)", skyrl.FIELD))
    ours, theirs = {"loss_metrics/drpo/loss_tokens/drpo_0.2": 9.0}, {"loss_metrics/clip_ratio": 0.1}
    trainer = SimpleNamespace()
    assert RayPPOTrainer._execute_training_step(trainer, "policy", ours) == ours
    assert RayPPOTrainer._execute_training_step(trainer, "critic", theirs) == theirs
    with pytest.raises(InputError, match="trained with a loss of its own"):
        RayPPOTrainer._execute_training_step(trainer, "policy", theirs)


def test_a_worker_process_gets_the_loss_from_the_registry(cluster: None):
    """Nothing registers the loss there; SkyRL's registry brings it."""
    skyrl.register()
    sync_registries()
    batch, cfg = rows(5), configured()

    @ray.remote(num_cpus=1)
    def slope(algorithm: Any, logp: Tensor, sampler: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Any, ...]:
        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

        unknown = "drpo" not in PolicyLossRegistry._functions
        leaf = logp.clone().requires_grad_()
        loss, seen = PolicyLossRegistry.get("drpo")(
            leaf, None, advantages, config=algorithm, loss_mask=mask, rollout_logprobs=sampler
        )
        loss.backward()
        return unknown, leaf.grad, seen

    unknown, found, seen = ray.get(
        slope.remote(
            cfg.trainer.algorithm, batch.logp, batch.behavior_logp, scaled_advantages(batch, "sequence_mean"),
            batch.keep.long(),
        ),
        timeout=600,
    )  # fmt: skip
    assert unknown and seen["drpo/unscored"] == 0
    wanted = direct_gradient("drpo(0.2)", batch, counted(batch, "sequence_mean"))
    assert (found.double() - wanted).abs().max() < 1e-6


def launched(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """SkyRL's own command, with the override; Ray keeps to this machine's own address."""
    override = "trainer.override_entrypoint=drpo.adapters.skyrl"
    places = [f"trainer.{name}_path={folder / name}" for name in ("log", "export", "ckpt")]
    command = [sys.executable, "-m", "skyrl.train.entrypoints.main_base", override, *places, CONSOLE, *words]
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=env)


def test_skyrls_command_reaches_its_experiment(tmp_path: Path):
    """Driver, validation, Ray and the task on the cluster; the first thing SkyRL then does is to read the tokenizer."""
    missing = tmp_path / "no-such-model"
    done = launched(tmp_path, f"{skyrl.FIELD}=drpo(0.2)", f"trainer.policy.model.path={missing}")
    assert done.returncode == 1
    assert "BasePPOExp(cfg).run()" in done.stderr and str(missing) in done.stderr
    assert str(Path(skyrl.trainer.__file__).parent) in done.stderr  # this SkyRL's, of the versions on the path


def test_skyrls_command_refuses_in_one_line(tmp_path: Path):
    done = launched(tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("drpo: trainer.algorithm.drpo_objective is not set") and "Traceback" not in done.stderr


UNFIT = {
    "trainer.algorithm.policy_loss_type=regular": r"policy_loss_type=regular: would ignore .* set it to drpo",
    "generator.sampling_params.logprobs=null": r"sampling_params\.logprobs=null: .* set it to 1",
    "trainer.algorithm.off_policy_correction.tis_ratio_type=token": "off_policy_correction .* is on",
    "trainer.algorithm.off_policy_correction.outlier_token_is_threshold_low=1e-4": "off_policy_correction .* is on",
    "trainer.algorithm.use_tis=true": r"use_tis\) is on",
    "trainer.fully_async.enabled=true": r"fully_async\.enabled=true: .*drpo\.adapters\.skyrl\.register",
    "generator.use_conversation_multi_turn=false": r"use_conversation_multi_turn=false: .*set it to true",
    "generator.chat_template.name_or_path=qwen3_with_thinking": r"name_or_path=qwen3_with_thinking: .*set it to null",
    "generator.sampling_params.top_p=0.9": r"sampling_params\.top_p=0\.9: .* set it to 1\.0",
    "generator.sampling_params.top_k=50": r"sampling_params\.top_k=50: .* set it to -1",
    "generator.sampling_params.min_p=0.1": r"sampling_params\.min_p=0\.1: .* set it to 0\.0",
    "generator.sampling_params.repetition_penalty=1.1": r"repetition_penalty=1\.1: .* set it to 1\.0",
    "generator.sampling_params.additional_kwargs.presence_penalty=1": r"additional_kwargs\.presence_penalty: .*remove",
    "generator.sampling_params.temperature=0.7": "set .*engine_init_kwargs.logprobs_mode=processed_logprobs",
    "trainer.algorithm.temperature=0.7": r"trainer\.algorithm\.temperature=0\.7: tokens are sampled at 1\.0",
    "generator.inference_engine.engine_init_kwargs.logprobs_mode=raw_logits": "logprobs_mode=raw_logits",
}


@pytest.mark.parametrize("word", UNFIT)
def test_unfit_configurations_are_refused(word: str):
    with pytest.raises(InputError, match=UNFIT[word]) as caught:
        skyrl.check(configured(word))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not SINCE_0_4, reason="engines of two roles have keywords of their own since SkyRL 0.4")
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_engines_of_either_role_must_report_what_they_sample_with(role: str):
    engine = "generator.inference_engine"
    both = [f"{engine}.{name}_init_kwargs.logprobs_mode=processed_logprobs" for name in ("prefill", "decode")]
    words = ["generator.sampling_params.temperature=0.7", f"{engine}.enable_pd=true"]
    skyrl.check(configured(*words, *both))
    with pytest.raises(InputError, match=f"set {engine}.{role}_init_kwargs.logprobs_mode=processed_logprobs"):
        skyrl.check(configured(*words, *(word for word in both if role not in word)))


REPLAY = (
    "trainer.algorithm.enable_sample_support_replay",
    "generator.inference_engine.enable_return_sample_support_set",
)


@pytest.mark.skipif(not SINCE_0_4, reason="the trainer replays the sampler's truncation since SkyRL 0.4")
def test_a_truncation_is_fit_where_the_trainer_replays_it():
    truncated = ["generator.sampling_params.top_k=20", "generator.sampling_params.top_p=0.9"]
    recorded, both = f"{REPLAY[1]}=true", [f"{name}=true" for name in REPLAY]
    skyrl.check(configured(*truncated, *both))
    skyrl.check(configured(*truncated, *both, "generator.sampling_params.temperature=0.7"))
    with pytest.raises(InputError, match=r"sampling_params\.top_p=0\.9: .* set it to 1\.0"):
        skyrl.check(configured(*truncated, recorded))
    raw = "generator.inference_engine.engine_init_kwargs.logprobs_mode=raw_logprobs"
    with pytest.raises(InputError, match=r"set generator\..*\.logprobs_mode=processed_logprobs"):
        skyrl.check(configured(*truncated, *both, raw))


@pytest.mark.skipif(not SINCE_0_4, reason="the trainer replays the sampler's truncation since SkyRL 0.4")
def test_the_replayed_policy_is_the_truncated_sampler():
    """Where they have the same weights, SkyRL's score is the log-probability among the tokens that were kept."""
    from skyrl.backends.skyrl_train.utils.sample_support_replay import sample_support_scores

    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    kept = logits.topk(4).indices.int()
    kept[0, 2:] = -1  # top_p kept fewer
    sampled = kept[:, 1].long()
    scores = sample_support_scores(
        logits.unsqueeze(0), sampled.unsqueeze(0), kept.unsqueeze(0), vocab_start_index=0, vocab_end_index=12,
        tp_group=None,
    )  # fmt: skip
    hidden = torch.full_like(logits, -torch.inf)
    for row, ids in enumerate(kept.tolist()):
        hidden[row, [i for i in ids if i >= 0]] = 0
    wanted = (logits + hidden).log_softmax(-1).gather(1, sampled.unsqueeze(1))[:, 0]
    assert torch.allclose(scores.logprobs[0], wanted, atol=1e-6)


def test_fit_configurations_are_not():
    processed = "generator.inference_engine.engine_init_kwargs.logprobs_mode=processed_logprobs"
    skyrl.check(configured("generator.sampling_params.temperature=0.7", processed))
    skyrl.check(configured("generator.sampling_params.top_k=0", "generator.sampling_params.logprobs=0"))
    skyrl.check(configured("generator.sampling_params.additional_kwargs.seed=1"))
    skyrl.check(configured("generator.use_conversation_multi_turn=false", "generator.batched=true"))


def test_objectives_that_do_not_fit_are_refused():
    for spec, message in {
        "dppo(0.15, divergence='topk_tv')": "reads the sampler's top-K",
        "drpo(0.2, advantage_weighted=False)": "is not weighted by the advantage",
        "mask(0.1) + 0.002*k2": "is not weighted by the advantage",
        "dropo(0.2)": "did you mean 'drpo'",
    }.items():
        with pytest.raises(InputError, match=message):
            skyrl.check(configured(objective=spec))


def test_an_entry_point_of_ones_own_is_not_left_unchecked():
    """Whoever registers the loss but not the field, or leaves a correction on, hears of it at the first step."""
    batch, config = rows(0), configured().trainer.algorithm
    rest = (scaled_advantages(batch, "token_mean"),)
    plain = skyrl.AlgorithmConfig(policy_loss_type="drpo")
    with pytest.raises(InputError, match=r"trainer\.algorithm\.drpo_objective is not set"):
        skyrl.policy_loss(batch.logp, None, *rest, plain, batch.keep.long(), batch.behavior_logp)
    corrected = replace(config.off_policy_correction, tis_ratio_type="token")
    with pytest.raises(InputError, match=r"off_policy_correction .* is on"):
        skyrl.policy_loss(
            batch.logp, None, *rest, replace(config, off_policy_correction=corrected), None, batch.behavior_logp
        )


def test_page():
    page = (PAGES / "skyrl.md").read_text()
    for word in ("trainer.override_entrypoint=drpo.adapters.skyrl", f"{skyrl.FIELD}=", skyrl.NAME):
        assert word in page
    run_page("skyrl")
