"""The environments of skyrl-gym (`pip install skyrl-gym`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from drpo.environments.contract import Environment
from drpo.environments.libraries.imports import library, suggestion
from drpo.environments.libraries.rows import RowsTask
from drpo.environments.libraries.seeded import Randomness
from drpo.environments.rewards import turns_say_all
from drpo.errors import InputError
from drpo.rewards import Reward
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import Message


@dataclass(frozen=True)
class SkyrlGym(RowsTask):
    """An environment of skyrl-gym: `skyrl_gym('gsm8k_multi_turn', "records('gsm8k.jsonl', 'question', 'answer')")`.

    The environment gets what SkyRL gives it: the row's messages and data, and its answer as `reward_spec.ground_truth`.
    Its rewards are those of the turns.

    Args:
        environment: its id.
        rows: the spec of the task with the problems.
        turns: at most, 1 to 1024; the environment reads them as `max_turns`.
        config: what SkyRL's configuration has for the environment: {"topk": 3}.

    Raises:
        InputError: skyrl-gym is not installed, an unknown environment, a value out of its range.
    """

    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    who: ClassVar[str] = "skyrl_gym"

    def __post_init__(self) -> None:
        known = library("skyrl_gym", self.who, "skyrl-gym").registry
        if self.environment not in known:
            listing = "skyrl_gym.pprint_registry()"
            raise InputError(
                f"skyrl_gym: unknown environment {self.environment!r}{suggestion(self.environment, known, listing)}"
            )
        self.require()

    @property
    def reward(self) -> Reward:
        """The turns earn it all."""
        return turns_say_all

    def open(self, problem: Problem, seed: int) -> Environment:
        """Return the episode of a problem."""
        return _Episode(self, problem, seed)


class _Episode:
    def __init__(self, task: SkyrlGym, problem: Problem, seed: int) -> None:
        self._task, self._problem, self._randomness = task, problem, Randomness(seed % 2**32)
        self._environment: Any = None

    def reset(self) -> Observation:
        gym, task = library("skyrl_gym", "skyrl_gym", "skyrl-gym"), self._task
        truth = {"method": "rule", "ground_truth": self._problem.answer}
        extras = {"reward_spec": truth, **self._problem.data, "max_turns": task.turns}
        with self._randomness.in_force():
            config = library("omegaconf", "skyrl_gym", "omegaconf").OmegaConf.create(dict(task.config))
            self._environment = gym.make(task.environment, env_config=config, extras=extras)
            messages, _ = self._environment.init([dict(m) for m in self._problem.messages])
        return Observation(_read(messages))

    def step(self, turn: Turn) -> StepResult:
        with self._randomness.in_force():
            result = self._environment.step(turn.text)
        done = bool(result["done"])
        said = () if done else _read(result["observations"]) or ({"role": "user", "content": "Go on."},)
        return StepResult(said, float(result["reward"]), done)

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()


def _read(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(dict(m) for m in messages)
