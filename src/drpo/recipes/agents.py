"""Recipes with tools and turns: what a model of 135M parameters learns on a laptop's CPU."""

from drpo.environments.calculator import Calculator
from drpo.environments.games import Guess
from drpo.model.names import SMOLLM2
from drpo.objectives import DRPO
from drpo.reductions import Horizon
from drpo.tasks import Task
from drpo.train.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainerConfig,
)
from drpo.train.optim import AdamW, Linear
from drpo.types import Sampling


def calculator() -> Run:
    """SmolLM2-135M learns to use a calculator for products of two factors, in minutes."""
    return _agent("calculator", Calculator(), steps=7, turn_tokens=24, episode_tokens=48)


def calculator_twice() -> Run:
    """SmolLM2-135M learns to use a calculator twice, for products of three factors."""
    return _agent("calculator_twice", Calculator(digits=2, factors=3), steps=10, turn_tokens=32, episode_tokens=96)


def guess() -> Run:
    """SmolLM2-135M learns to guess a number by "higher" and "lower"."""
    return _agent("guess", Guess(), steps=20, turn_tokens=8, episode_tokens=32)


def _agent(name: str, task: Task, *, steps: int, turn_tokens: int, episode_tokens: int) -> Run:
    return Run(
        name=name,
        model=ModelConfig(SMOLLM2),
        data=DataConfig(task, prompts=8),
        rollout=RolloutConfig(sampling=Sampling(samples=8, max_new_tokens=turn_tokens)),
        objective=ObjectiveConfig(DRPO(0.2), reduction=Horizon(episode_tokens)),
        optimizer=OptimizerConfig(AdamW(2e-5), Linear()),
        trainer=TrainerConfig(steps=steps, updates=2, micro_batch_tokens=2048),
        evaluation=EvaluationConfig(problems=50),
    )
