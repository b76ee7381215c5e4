"""TRL: the parquet files of `log_completions`, a file per logged step."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drpo.autopsy.dumped import Dumped, Format
from drpo.autopsy.parquet import column_names, numeric_columns, read_rows, require_whole
from drpo.errors import InputError

_OTHERS = ("step", "advantage")


def read(path: Path) -> Iterator[Dumped]:
    """Yield the rollouts of a file; within a step, rollouts of one prompt are a group.

    TRL writes no sum of the rewards. The reward here is the sum of all numeric columns between "completion" and
    "advantage", each with weight 1; None where every reward function returned None.

    Raises:
        InputError: there is no such column, or a row has other types.
    """
    names = column_names(path)
    rewards = [name for name in numeric_columns(path) if name not in _OTHERS and not name.startswith("__index")]
    if not rewards:
        raise InputError(f"{path}: no column of rewards, which are numbers, among {', '.join(names)}")
    for where, row in read_rows(path, ("step", "prompt", "completion", "advantage", "token_ids", *rewards)):
        yield _rollout(where, row, rewards)


def _rollout(where: str, row: Any, rewards: Sequence[str]) -> Dumped:
    parts = {name: float(row[name]) for name in rewards if row[name] is not None and row[name] == row[name]}
    prompt, completion, advantage, ids = row["prompt"], row["completion"], row["advantage"], row.get("token_ids")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not isinstance(row["step"], int):
        raise InputError(f"{where}: step, prompt and completion must be a whole number and two texts")
    require_whole(ids, where)
    if advantage is not None and not isinstance(advantage, float | int):
        raise InputError(f"{where}: advantage is {str(advantage)[:40]!r}, and must be a number")
    return Dumped(
        step=row["step"],
        group=prompt,
        reward=sum(parts.values()) if parts else None,
        length=len(completion if ids is None else ids),
        prompt=prompt,
        text=completion,
        parts=parts,
        advantages=None if advantage is None else np.array([advantage], dtype=np.float32),
        token_ids=ids,
    )


_EXTRA = "a reward function can log it: log_extra('token_ids', completion_ids)"

FORMAT = Format(
    name="TRL",
    version="1.9.0",
    suffix=".parquet",
    keys=frozenset({"step", "prompt", "completion", "advantage"}),
    read=read,
    objective="ppo(0.2,0.2)",
    remedies={
        "finish_reason": "TRL writes none; the metric completions/clipped_ratio of its log has the share",
        "token_ids": _EXTRA,
        "behavior_logp": "TRL writes none; a subclass's _generate_and_score_completions has sampling_per_token_logps",
        "logp": "TRL writes none; the metric sampling/sampling_logp_difference of its log has the difference",
        "held_out": "name completions of an evaluation after --held-out",
    },
    options={
        "--sampling.max-new-tokens": "max_completion_length",
        "--sampling.samples": "num_generations",
        "--sampling.temperature": "temperature",
        "--updates": "num_iterations",
        "--reference-kl": "beta",
        "--max-grad-norm": "max_grad_norm",
        "--reduction": "loss_type",
    },
)
