"""One of several processes of a run, started by torchrun: tests/support/rank.py FOLDER KIND SHARD STOP."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from drpo.credit.gae import GAE
from drpo.model.activations import is_checkpointed
from drpo.ranks import process_group
from drpo.train import memory
from drpo.train.callbacks import NullCallback
from drpo.train.config import Run
from drpo.train.curriculum import Pools
from drpo.train.loop import train
from drpo.train.optim import AdamW, AdamW8bit
from drpo.train.setup import Components, build
from support.architectures import mixture
from support.environments import Chat
from support.tiny_world import STOPS, small, tiny
from support.worlds import sampling, tiny_run

# The rounding of weights alone makes a token's experts differ, and is the same for any number of rows.
MIXTURE: dict[str, Any] = {
    "model": "support.rank:mixed",
    "rollout_precision": "fp8_weights",
    "prompts": 6,
    "sampling": sampling(samples=4),
    "micro_batch_tokens": 40,
    "optimizer": AdamW(2e-4),
}

# Completions of 1 to 8 tokens; in "few" most ranks of four have nothing to train on.
KINDS: dict[str, dict[str, Any]] = {
    "many": {"prompts": 6, "sampling": sampling(samples=4), "updates": 2, "micro_batch_tokens": 40},
    "fewer": {"prompts": 6, "sampling": sampling(samples=4), "updates": 2, "micro_batch_tokens": 40, "steps": 6},
    # AdamW makes whole steps of gradients that are but rounding, so these take small ones.
    "turns": {
        "task": Chat(),
        "prompts": 6,
        "sampling": sampling(samples=4),
        "updates": 2,
        "micro_batch_tokens": 60,
        "optimizer": AdamW(2e-4),
    },
    # Its head is its embedding.
    "tied": {"model": "tiny", "optimizer": AdamW(2e-4), "steps": 4, "checkpoint_every": 2, "eval_problems": 2},
    "compact": {"prompts": 6, "updates": 2, "optimizer": AdamW8bit(2e-5)},  # a rounding that moves a code moves little
    "few": {"prompts": 2, "sampling": sampling(samples=2), "updates": 2, "optimizer": AdamW(2e-4)},
    "terms": {
        "prompts": 3,
        "updates": 1,
        "reference_kl": 0.1,
        "kl_in_reward": 0.1,
        "entropy_bonus": 0.01,
        "async_steps": 1,
        "sync_every": 2,
        "optimizer": AdamW(2e-4),
    },
    "resampled": {
        "prompts": 6,
        "sampling": sampling(samples=4),
        "updates": 2,
        "dynamic_sampling": 2,
        "async_steps": 1,
        "optimizer": AdamW(2e-4),
    },
    # Of 16 problems, of which the random model's digits make some hard.
    "curriculum": {
        "prompts": 6,
        "sampling": sampling(samples=8),
        "curriculum": Pools(easy=0.3, hard=0.05, revisit=0.2),
        "dynamic_sampling": 1,
        "async_steps": 1,
        "optimizer": AdamW(2e-4),
    },
    "lora": {"lora_rank": 2, "prompts": 6, "sampling": sampling(samples=4), "updates": 2, "micro_batch_tokens": 40},
    "experts": {"lora_rank": 2, "model": "support.rank:mixed", "optimizer": AdamW(2e-4)},
    # Two batches of one or two completions, so that the critic of the other rank has nothing to learn from.
    "vllm": {"model": "support.rank:wide", "engine": "vllm", "prompts": 6, "sampling": sampling(samples=4)},
    "replay": MIXTURE | {"routing_replay": "sampler"},
    "own replay": MIXTURE | {"routing_replay": "trainer", "updates": 2},
    "critic": {
        "prompts": 3,
        "sampling": sampling(samples=1),
        "critic": GAE(updates=2),
        "critic_optimizer": AdamW(1e-3),
    },
}


def wide() -> Any:
    """A model that vLLM can run."""
    return small()


def short() -> Any:
    """A model that many words end, so that lengths differ."""
    return tiny(STOPS)


def mixed() -> Any:
    """A mixture of experts that many words end."""
    _, tokenizer = tiny(STOPS)
    model = mixture()
    model.generation_config.eos_token_id = sorted({0, *STOPS})
    return model, tokenizer


CHECKPOINTED = ("few", "tied", "critic", "experts")
"""Kinds whose divided models compute their layers again; gradients are the same."""


def run_of(kind: str, shard: str = "none") -> Run:
    plain = {
        "model": "support.rank:short",
        "steps": 10,
        "eval_problems": 5,
        "checkpoint_every": 1,
        "optimizer": AdamW(3e-3),
    }
    again = {"checkpoint_activations": "on"} if shard == "fsdp" and kind == "critic" else {}
    return tiny_run(**(plain | KINDS[kind] | again), shard=shard)


class Stops(NullCallback):
    """Asks the run to stop after some steps, as a scheduler's SIGTERM on one of the processes would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, step: int, *rest: Any) -> None:
        if step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


def holds(components: Components) -> str:
    """How much this rank has of the policy's weights, and of the critic's."""
    policy, critic = components.policy, components.critic
    said = f"rank {components.ranks.rank} holds {held(policy.model)} of {whole(policy.model)} weights"
    if critic is None:
        return said
    own, all_ = ([f(critic.critic.model), f(critic.critic.head)] for f in (held, whole))
    return f"{said}\nits critic has {sum(own)} of {sum(all_)} values"


def require_fresh_head(components: Components) -> None:
    """The first pass reads the weights that a checkpoint loads after the components are built."""
    policy = components.policy
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.zero_()
    assert not policy.head.weight.any(), "the head was gathered before weights were loaded"


def held(module: nn.Module) -> int:
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())


def whole(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main(folder: str, kind: str, shard: str, stop: str) -> None:
    torch.set_num_threads(1)
    run = run_of(kind, shard)
    if shard == "fsdp" and kind in CHECKPOINTED:  # "auto" measures, and nothing fits
        memory.free_bytes = lambda device: 0
    with process_group() as ranks:
        train(run, Path(folder), Stops(int(stop)), build(run, ranks))
        if shard == "fsdp":
            components = build(run, ranks)
            assert is_checkpointed(components.policy.model) == (kind in CHECKPOINTED)
            print(holds(components))
            require_fresh_head(components)


if __name__ == "__main__":
    main(*sys.argv[1:])
