"""Rewards: (problem, text) -> score, and the pool that runs them safely."""

from drpo.rewards.contract import Reward, in_process
from drpo.rewards.marking import Mark, Marking
from drpo.rewards.math import math_verify
from drpo.rewards.number import exact_number
from drpo.rewards.pool import RewardPool

TABLE: dict[str, Reward] = {"exact_number": exact_number, "math_verify": math_verify}

__all__ = ["TABLE", "Mark", "Marking", "Reward", "RewardPool", "exact_number", "in_process", "math_verify"]
