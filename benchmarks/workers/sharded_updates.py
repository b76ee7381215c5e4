"""One of torchrun's processes, which train a whole policy and one divided by FSDP2: sharded_updates SETUP OUT."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.workers.drpo_growth import made_up
from benchmarks.workers.measure import synchronize
from drpo.batch import BatchConfig, make_batches
from drpo.credit import advantages, group_credit
from drpo.model import loading
from drpo.model.device import choose_device
from drpo.model.policy import Policy
from drpo.model.precision import resolve_precision
from drpo.model.sharding import ShardedPolicy
from drpo.objectives import DRPO
from drpo.ranks import Ranks, select_device
from drpo.reductions import Horizon
from drpo.train.optim import AdamW
from drpo.train.step import update_policy

RATE = 1e-6


def updates(setup: Mapping[str, Any], ranks: Ranks, *, divided: bool) -> dict[str, Any]:
    """Train on made-up completions.

    Args:
        setup: "model", "precision", "updates", "micro_batch_tokens", and what `made_up` wants.
        ranks: the processes that train together, whose process group is there.
        divided: by FSDP2.

    Returns:
        "seconds": of an update, the median of all but the first; "losses" and "grad_norms" of each.
    """
    device = choose_device(processes=ranks.size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, _ = loading.load(setup["model"])
    model.to(device)
    settings: dict[str, Any] = {"precision": resolve_precision(setup["precision"], device), "temperature": 1.0}
    policy = ShardedPolicy(model, ranks, device, **settings) if divided else Policy(model, **settings)
    optimizer = AdamW(RATE).build(list(policy.trainable().values()), [])
    groups = made_up(setup, model.get_output_embeddings().weight.shape[0])
    config = BatchConfig(
        updates=1,
        reduction=Horizon(setup["new_tokens"]),
        micro_batch_tokens=setup["micro_batch_tokens"],
        skip_zero_advantage=True,
        share_prompts=policy.shares_prompts,
        ranks=ranks.size,
    )
    (batch,) = make_batches(groups, group_credit(groups, advantage=advantages.mean), config)
    seconds, stats = [], []
    for _ in range(setup["updates"]):
        ranks.barrier()
        begun = time.perf_counter()
        stats.append(update_policy(policy, optimizer, batch, DRPO(0.2), RATE, 1.0, ranks=ranks))
        synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": median(seconds[1:] or seconds),
        "losses": [s.loss for s in stats],
        "grad_norms": [s.grad_norm for s in stats],
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def main(setup: Mapping[str, Any], out: Path) -> None:
    """Train both, one after the other; the first process writes the record."""
    select_device()
    cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
        ways = {name: updates(setup, ranks, divided=name == "FSDP2") for name in ("whole", "FSDP2")}
        if ranks.is_main:
            out.write_text(json.dumps({"backend": "nccl" if cuda else "gloo", "ways": ways}), encoding="utf-8")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
