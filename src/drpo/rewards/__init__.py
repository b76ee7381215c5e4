"""Rewards: functions from a problem and an answer to a score; and the pool that runs them in processes."""

from drpo.rewards.contract import Reward, in_process
from drpo.rewards.form import Format, Length, Regex
from drpo.rewards.match import ExactMatch
from drpo.rewards.number import exact_number
from drpo.rewards.pool import RewardPool
from drpo.rewards.python import PythonTests
from drpo.rewards.scoring import RewardConfig, Scored
from drpo.rewards.weighted import WeightedSum, of_summands, summands
from drpo.spec import Registry

REGISTRY: Registry[Reward] = Registry(
    "reward",
    {
        "exact_number": exact_number,
        "exact_match": ExactMatch,
        "math_verify": "drpo.rewards.math:math_verify",  # sympy takes half a second to import
        "python_tests": PythonTests,
        "judge": "drpo.rewards.judge:Judge",  # an HTTP client, which few runs need
        "http_reward": "drpo.rewards.judge:HttpReward",
        "classifier": "drpo.rewards.classifier:Classifier",
        "format": Format,
        "regex": Regex,
        "length": Length,
    },
    of_sum=of_summands,
    summands=summands,
)

__all__ = [
    "REGISTRY",
    "ExactMatch",
    "Format",
    "Length",
    "PythonTests",
    "Regex",
    "Reward",
    "RewardConfig",
    "RewardPool",
    "Scored",
    "WeightedSum",
    "exact_number",
    "in_process",
]
