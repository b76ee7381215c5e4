"""The reward of the recipes: math-verify in child processes, 0 or 1, as verl calls it.

`reward.custom_reward_function.path` names this file; verl loads it in each of its reward workers.
"""

import atexit
import threading
from functools import cache
from typing import Any

from drpo.rewards import RewardConfig, RewardPool
from drpo.rewards.math import math_verify
from drpo.types import Problem

SECONDS = 10.0
_ONE_AT_A_TIME = threading.Lock()  # verl calls from several threads of a worker; it has eight workers


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """Score one completion.

    Args:
        data_source: the set that the problem is from; all are scored alike.
        solution_str: the completion, text.
        ground_truth: the answer.
        extra_info: not used.

    Returns:
        `score` and `acc`, 0 or 1; `failed`, 1 where the scoring hung or broke, in which case the score is 0.
    """
    with _ONE_AT_A_TIME:
        (scored,) = _pool().score([(Problem.of_text(data_source, "", str(ground_truth)), solution_str)])
    score = scored.score or 0.0
    return {"score": score, "acc": score, "failed": float(scored.failure is not None)}


def compute_boxed_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """Score an episode with tools: as `compute_score`, but 0 where nothing is boxed.

    verl hands over what the tools said too. Without this rule the last number of a tool would count as an answer.
    """
    if "\\boxed{" not in solution_str:
        return {"score": 0.0, "acc": 0.0, "failed": 0.0}
    return compute_score(data_source, solution_str, ground_truth)


@cache
def _pool() -> RewardPool:
    pool = RewardPool(math_verify, RewardConfig(seconds=SECONDS)).__enter__()
    atexit.register(pool.__exit__)
    return pool
