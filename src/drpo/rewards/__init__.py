"""Rewards: (problem, text) -> score, and the pool that runs them safely."""

from collections.abc import Callable, Mapping
from typing import Any

from drpo.rewards.contract import Reward, in_process
from drpo.rewards.marking import Mark, RewardConfig
from drpo.rewards.number import exact_number
from drpo.rewards.pool import RewardPool
from drpo.rewards.python import PythonTests

TABLE: Mapping[str, Callable[..., Any] | str] = {
    "exact_number": exact_number,
    "math_verify": "drpo.rewards.math:math_verify",  # sympy takes half a second to import
    "python_tests": PythonTests,
}

__all__ = [
    "TABLE",
    "Mark",
    "PythonTests",
    "Reward",
    "RewardConfig",
    "RewardPool",
    "exact_number",
    "in_process",
]
