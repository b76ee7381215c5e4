# ruff: noqa: E402
"""From sampled rows to updates through verl's own trainer, its transfer queue on Ray, and its worker, on a CPU.

What is missing of a training run is the sampler: the rows, their scores and their rewards are made up here.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.adapters
cpu = pytest.importorskip("adapters.verl_on_cpu")  # before verl, whose platform it chooses

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from torch import Tensor
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from adapters.verl_batches import directly, full, sampled
from adapters.verl_recipe import recipe

SPEC = "drpo(0.005)"
RATE = 1e-2
REWARDS = (1.0, 0.0, 0.0, 1.0)
ADVANTAGES = (0.5, -0.5, -0.5, 0.5)
KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]  # two prompts, two samples each


@pytest.fixture(scope="module")
def config() -> Iterator[DictConfig]:
    """The 4B recipe with one prompt an update, and the queue that verl's trainer keeps its rows in."""
    small = ("actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=1")
    named = f'actor_rollout_ref.actor.policy_loss.objective="{SPEC}"'
    queue = ("transfer_queue.enable=true", "transfer_queue.backend.SimpleStorage.num_data_storage_units=1")
    composed = recipe("qwen3-4b", "objective=drpo", *small, named, *queue)
    ray.init(num_cpus=12, include_dashboard=False, logging_level="ERROR")
    tq.init(composed.transfer_queue)
    yield composed
    tq.close()
    ray.shutdown()


class Group:
    """Stands for Ray's group of workers: hands what it is asked for to one worker in this process."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def update_actor(self, batch: Any) -> Any:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
        tu.assign_non_tensor(data, **batch.extra_info)
        return self.worker.train_mini_batch(data)


def queued(rows: tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]) -> Any:
    """The rows as verl's agent loop leaves them: scored by the sampler, rewarded at their last token."""
    prompts, responses, columns = rows
    rewards = [torch.zeros(len(response)) for response in responses]
    for row, reward in zip(rewards, REWARDS, strict=True):
        row[-1] = reward
    scored = {
        "rollout_log_probs": columns["old_log_probs"],
        "response_mask": [mask.long() for mask in columns["response_mask"]],
        "rm_scores": rewards,
    }
    data = cpu.batch_of(prompts, responses, scored)
    fields = tu.get_tensordict({name: data[name] for name in data.keys()} | {"uid": [key[0] for key in KEYS]})  # noqa: SIM118
    return tq.kv_batch_put(keys=KEYS, partition_id="train", fields=fields, tags=[{}] * len(KEYS))


def test_the_samplers_scores_reach_every_update_unchanged(config: DictConfig, tmp_path: Path):
    cpu.tiny_model(str(tmp_path / "model"))
    worker = cpu.worker(str(tmp_path / "model"), str(tmp_path / "store"), RATE)
    chosen = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    worker.set_loss_fn(lambda **given: ppo_loss(chosen, **given))
    trainer = SimpleNamespace(config=config, actor_rollout_wg=Group(worker))
    rows = sampled(1)
    mu = rows[2]["old_log_probs"]

    batch = PPOTrainer._compute_old_log_prob(trainer, queued(rows), {})
    batch = PPOTrainer._compute_advantage(trainer, batch, {})
    seen = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["old_log_probs", "advantages"])
    assert all(torch.equal(a, b) for a, b in zip(seen["old_log_probs"].unbind(), mu, strict=True))
    assert [row[0].item() for row in seen["advantages"].unbind()] == pytest.approx(ADVANTAGES)
    metrics: dict[str, float] = {}
    PPOTrainer._update_actor(trainer, batch, metrics)

    model = cpu.Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rows[2]["advantages"] = [torch.full((len(r),), a) for r, a in zip(rows[1], ADVANTAGES, strict=True)]
    losses = []
    for prompt in (slice(0, 2), slice(2, 4)):
        part = (rows[0][prompt], rows[1][prompt], {name: rows_[prompt] for name, rows_ in rows[2].items()})
        n_tokens = sum(int(mask.sum()) for mask in part[2]["response_mask"])
        loss = directly(model, part, SPEC) * n_tokens / (2 * 8192)  # two rows, each divided by the horizon
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert metrics["actor/loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert metrics["actor/drpo/out_of_region"] > 0 and metrics["actor/drpo/unscored"] == 0
    moved = [
        (full(theirs) - ours).abs().max().item()
        for theirs, ours in zip(worker.engine.module.parameters(), model.parameters(), strict=True)
    ]
    assert max(moved) < 0.02 * RATE


def test_without_bypass_mode_verl_would_ask_the_trainer(config: DictConfig):
    asked: list[str] = []

    class RecomputedError(Exception): ...

    def compute_log_prob(batch: Any) -> Any:
        asked.append("trainer")
        raise RecomputedError

    decoupled = config.copy()
    decoupled.algorithm.rollout_correction.bypass_mode = False
    trainer = SimpleNamespace(config=decoupled, actor_rollout_wg=SimpleNamespace(compute_log_prob=compute_log_prob))
    with pytest.raises(RecomputedError):
        PPOTrainer._compute_old_log_prob(trainer, queued(sampled(2)), {})
    assert asked == ["trainer"]
