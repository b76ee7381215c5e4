"""open-instruct: the JSON lines of `--save_traces`, in shards of some ten thousand rollouts."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from drpo.autopsy.dumped import Dumped, Format
from drpo.autopsy.lines import Floats, Ints, read_lines


class _Row(msgspec.Struct):
    step: int
    prompt_idx: int
    response_tokens: Ints
    reward: float | None
    advantage: float | None
    finish_reason: str | None = None
    logprobs: Floats | None = None


def read(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a shard; within a step, rollouts with equal `prompt_idx` are a group."""
    for _, row in read_lines(path, _Row):
        yield Dumped(
            step=row.step,
            group=str(row.prompt_idx),
            reward=row.reward,
            length=len(row.response_tokens),
            cut=None if row.finish_reason is None else row.finish_reason == "length",
            advantages=None if row.advantage is None else np.array([row.advantage], dtype=np.float32),
            token_ids=row.response_tokens,
            behavior_logp=row.logprobs,
        )


FORMAT = Format(
    name="open-instruct",
    version="0.3.0",
    suffix=".jsonl",
    keys=frozenset({"prompt_idx", "response_tokens", "reward"}),
    read=read,
    objective="ppo(0.2,0.2)",
    remedies={
        "behavior_logp": "open-instruct writes them where vLLM returns them",
        "logp": "the traces are written before the trainer has any; docs/autopsy.md has a form that holds them",
        "held_out": "open-instruct saves none; name rollouts in the form of docs/autopsy.md after --held-out",
    },
    options={
        "--sampling.max-new-tokens": "--response_length",
        "--sampling.samples": "--num_samples_per_prompt_rollout",
        "--sampling.temperature": "--temperature",
        "--updates": "--num_epochs",
        "--async-steps": "--async_steps",
        "--reference-kl": "--beta",
        "--max-grad-norm": "--max_grad_norm",
    },
)
