"""An environment as a user of OpenEnv writes it: reach a number by steps of 1 to 3."""

import random
from typing import Any

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Add(Action):
    amount: int


class Total(Observation):
    total: int
    goal: int


class Counter(Environment[Add, Total, State]):
    def __init__(self) -> None:
        super().__init__()
        self._state = State()
        self.total, self.goal = 0, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Total:
        self.total, self.goal = 0, random.Random(seed).randint(3, 9)
        self._state = State(episode_id=episode_id)
        return Total(total=0, goal=self.goal)

    def step(self, action: Add, timeout_s: float | None = None, **kwargs: Any) -> Total:
        self._state.step_count += 1
        self.total += action.amount
        over = self.total >= self.goal
        return Total(total=self.total, goal=self.goal, done=over, reward=float(self.total == self.goal))

    @property
    def state(self) -> State:
        return self._state


class Untyped(Environment):
    """Its actions are not declared."""

    def reset(self, seed: Any = None, episode_id: Any = None, **kwargs: Any) -> Observation:
        return Observation()

    def step(self, action: Any, timeout_s: Any = None, **kwargs: Any) -> Observation:
        return Observation(done=True)

    @property
    def state(self) -> State:
        return State()


def shown(observation: Total) -> str:
    return f"{observation.total} of {observation.goal}"


def read(text: str) -> Add:
    """The number of letters, so that a model that knows nothing plays."""
    return Add(amount=len(text) % 4)


class Note(Action):
    text: str


class Said(Observation):
    text: str


class Closed(Counter):
    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Total:
        raise OSError("closed\ntoday")
