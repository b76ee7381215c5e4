"""What has another name since the recorded commit: entries are added in the commit that renames.

Each table is for the keys at any depth of one kind of record: old name -> new name. In place of a new name

    None                    the key is gone, or changed its meaning on purpose; the comment behind it says which and why
    ("name", convert)       the new key's value is convert(old value, the run's settings)

`ADDED` lists keys of the new side alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

from runs import Settings

Convert = Callable[[Any, Settings], Any]
Table = Mapping[str, str | tuple[str, Convert] | None]

METRICS: Table = {
    "shift_mean": "prob_diff_mean",
    "shift_p99": "prob_diff_p99",
    "held": "masked",
    "all_right": "groups_all_correct",
    "all_wrong": "groups_all_wrong",
    "capped": "ratio_capped",
    "lag": "staleness",
    "lag_max": "staleness_max",
    "outside": None,  # was |pi - mu| > 0.15 for every objective without a radius of its own; now its own region
}
"""Of metrics.jsonl."""

EVALUATIONS: Table = {"accuracy": "reward_mean"}
"""Of evaluations.jsonl."""

ROLLOUTS: Table = {
    "prompt": None,  # as the model read it, template included
    "finish": "finish_reason",
}
"""Of rollouts.jsonl."""

WEIGHTS: Table = {}
"""Names of tensors in files of weights."""

TABLES: Mapping[str, Table] = {
    "metrics": METRICS, "evaluations": EVALUATIONS, "rollouts": ROLLOUTS, "weights": WEIGHTS,
}  # fmt: skip

ADDED: Mapping[str, frozenset[str]] = {
    "metrics": frozenset({"out_of_region", "out_of_region_low", "out_of_region_high"}),
    "evaluations": frozenset({"reward_parts"}),
    "rollouts": frozenset({"prompt"}),
    "weights": frozenset(),
}
