"""Comparisons made up trial by trial, so that every number of their report is known."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from drpo.lab.grid import parse_variant
from drpo.lab.trial_result import FINISHED, SERIES, WAITING, Comparison, Trial
from drpo.train.config import flat_json
from support.worlds import tiny_run

OBJECTIVES = ("none", "ppo(0.2, 0.28)", "spo(12.5)", "dppo(0.15, 0.15)", "drpo(12.5)", "drpo(0.2)")


@cache
def base(objective: str) -> dict[str, Any]:
    """A configuration, as a trial has it."""
    return flat_json(tiny_run(objective=parse_variant(objective).objective))


def trial(objective: str, seed: int, rewards: Sequence[float], **changes: Any) -> Trial:
    """A finished trial with some training rewards, or without any a waiting one; `changes` are of its configuration."""
    config = {**base(objective), "seed": seed, "steps": len(rewards), **changes}
    name = "-".join([objective.replace("(", "_").rstrip(")"), str(seed), *map(str, changes.values())])
    series = {metric: tuple(0.1 + 0.01 * i for i in range(len(rewards))) for metric in SERIES}
    status = FINISHED if rewards else WAITING
    return Trial(name, config, status, None, {**series, "reward_mean": tuple(rewards)}, ())


def comparison(trials: Sequence[Trial], name: str = "by-hand") -> Comparison:
    """Trials as a comparison."""
    return Comparison(name, tuple(trials), {})


def large(seeds: int = 5, updates: int = 5, rates: int = 2, steps: int = 64) -> Comparison:
    """Six objectives with made-up curves: 300 trials of 64 steps, unless asked for other numbers."""
    draw = random.Random(0)
    trials = []
    for seed, u, r, objective in product(range(seeds), range(updates), range(rates), OBJECTIVES):
        end = 0.3 + 0.1 * OBJECTIVES.index(objective) - 0.03 * u + 0.05 * r
        rewards = [min(1.0, max(0.0, end * i / steps + draw.gauss(0, 0.05))) for i in range(steps)]
        made = trial(objective, seed, rewards, updates=2**u, optimizer=f"adamw({1e-5 * 2**r})")
        noisy = {k: tuple(abs(draw.gauss(0.3, 0.1)) for _ in rewards) for k in SERIES if k != "reward_mean"}
        trials.append(replace(made, series={**made.series, **noisy}, evaluations=((0, 0.1), (steps, rewards[-1]))))
    return comparison(trials)
