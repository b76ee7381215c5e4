"""verl: the JSON lines of `trainer.rollout_data_dir` and `trainer.validation_data_dir`, a file per step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from drpo.autopsy.dumped import Dumped, Format
from drpo.autopsy.lines import read_lines


class _Row(msgspec.Struct):
    input: str
    output: str
    score: float | None
    step: int
    gts: Any = None


def read(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a file; within a step, rollouts of one prompt are a group."""
    for _, row in read_lines(path, _Row):
        yield Dumped(
            step=row.step,
            group=row.input,
            reward=row.score,
            length=len(row.output),
            prompt=row.input,
            text=row.output,
            answer="" if row.gts is None else str(row.gts),
        )


_PAGE = "docs/autopsy.md#verl has the lines that write them from the batch"

FORMAT = Format(
    name="verl",
    version="0.9.0",
    suffix=".jsonl",
    keys=frozenset({"input", "output", "score", "step"}),
    read=read,
    objective="ppo(0.2,0.2)",
    remedies={
        "finish_reason": f"verl decodes without it; {_PAGE}",
        "token_ids": f"verl decodes them; {_PAGE}",
        "behavior_logp": f"rollout.calculate_log_probs=true has them computed; {_PAGE}",
        "logp": f"`old_log_probs` of the batch; {_PAGE}",
        "held_out": "set trainer.validation_data_dir, and name its files after --held-out",
    },
    options={
        "--sampling.max-new-tokens": "data.max_response_length",
        "--sampling.samples": "actor_rollout_ref.rollout.n",
        "--sampling.temperature": "actor_rollout_ref.rollout.temperature",
        "--updates": "actor_rollout_ref.actor.ppo_epochs",
        "--entropy-bonus": "actor_rollout_ref.actor.entropy_coeff",
        "--reference-kl": "actor_rollout_ref.actor.use_kl_loss",
        "--max-grad-norm": "actor_rollout_ref.actor.grad_clip",
        "--reduction": "actor_rollout_ref.actor.loss_agg_mode",
    },
)
