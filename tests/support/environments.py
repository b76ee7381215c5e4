"""Environments for tests: a conversation of a few turns about nothing much."""

from dataclasses import dataclass, replace

from drpo.environments.rewards import turns_say_all
from drpo.rewards import Reward, in_process
from drpo.tasks import Addition
from drpo.train.config import Run
from drpo.train.setup import Components, build
from drpo.types import Problem
from drpo.types.environment import Observation, StepResult, Turn
from drpo.types.problem import message

TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""It leaves out what tools say, so that the history has to be rendered anew after it."""


@in_process
@dataclass(frozen=True)
class Chat:
    """Answers some turns, and rewards each by the share of its characters that are digits.

    Args:
        turns: of an episode.
        role: of the answers.
        paid: whether the turns are rewarded.
    """

    turns: int = 3
    role: str = "user"
    paid: bool = True

    @property
    def reward(self) -> Reward:
        return turns_say_all if self.paid else Addition().reward

    @property
    def max_turns(self) -> int:
        return self.turns

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        return Addition().sample(n, step, seed)

    def held_out(self, n: int) -> list[Problem]:
        return Addition().held_out(n)

    def open(self, problem: Problem, seed: int) -> "Chatting":
        return Chatting(self, problem, seed)


class Chatting:
    def __init__(self, chat: Chat, problem: Problem, seed: int) -> None:
        self._chat, self._problem, self._seed, self._turns = chat, problem, seed, 0

    def reset(self) -> Observation:
        return Observation(self._problem.messages)

    def step(self, turn: Turn) -> StepResult:
        self._turns += 1
        reward = sum(c.isdigit() for c in turn.text) / (1 + len(turn.text)) if self._chat.paid else 0.0
        done = self._turns == self._chat.turns
        reply = dict(message(self._chat.role, f"{self._seed % 97} and {self._turns}?"))
        return StepResult(() if done else (reply,), reward=reward, done=done)

    def close(self) -> None:
        pass


def talkative(run: Run, template: str | None = None) -> Components:
    """The components of a run whose untrained model ends a turn every few tokens, and goes on."""
    components = build(run)
    if template is not None:
        components.tokenizer.chat_template = template
    return replace(components, driver=replace(components.driver, stop=frozenset(range(24))))


def double(x: int) -> int:
    """Double a number.

    Args:
        x: the number.
    """
    return 2 * x
