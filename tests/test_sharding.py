"""A divided model, in a process group of this process alone; tests/test_ranks.py has several processes."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from drpo.model.policy import Policy
from drpo.model.precision import FP32
from drpo.model.sharding import ShardedPolicy
from drpo.objectives import DRPO
from drpo.ranks import SINGLE_PROCESS
from drpo.train.optim import AdamW
from drpo.train.step import update_policy
from drpo.types import StepStats
from support.architectures import mixture
from support.tiny_world import REWARDS, STOPS, batched, grouped, how, sampled, tiny


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def divided(model: PreTrainedModel, rank: int) -> ShardedPolicy:
    return ShardedPolicy(model, SINGLE_PROCESS, model.device, precision=FP32, temperature=1.0, lora_rank=rank)


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda: tiny(STOPS)[0], id="tied head", marks=pytest.mark.slow), pytest.param(mixture, id="experts")],
)
def test_divided_adapters_train_as_whole_ones(make, process_group: None) -> None:
    batch = batched(grouped(sampled(*tiny(STOPS)), REWARDS), how())[0]

    def updated(policy: Policy) -> list[StepStats]:
        optimizer = AdamW(0.01).build(list(policy.trainable().values()), [])
        return [update_policy(policy, optimizer, batch, DRPO(0.2), 0.01, 0.03) for _ in range(3)]

    before = dict(make().named_parameters())
    whole, parts = Policy(make(), precision=FP32, temperature=1.0, lora_rank=2), divided(make(), rank=2)
    assert parts.trainable().keys() == whole.trainable().keys()
    assert all(isinstance(p, DTensor) for p in parts.model.parameters())
    ours, theirs = updated(parts), updated(whole)
    assert [s.grad_norm for s in ours] == pytest.approx([s.grad_norm for s in theirs], rel=1e-5)
    assert min(s.grad_norm for s in ours) > 0.03, "nothing was clipped"
    state, expected = parts.state(), whole.state()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    changed = {name for name, value in state.items() if not torch.equal(value, before[name])}
    assert len(changed) == sum(".lora_A." in name for name in whole.trainable())
    assert all(isinstance(p, DTensor) for p in parts.model.parameters()), "merging left whole adapters behind"
    plain, logits = parts.plain(), parts.logits(torch.arange(1, 9))
    torch.testing.assert_close(plain(input_ids=torch.arange(1, 9)[None]).logits[0], logits, rtol=0, atol=2e-5)
