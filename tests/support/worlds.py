"""Small worlds for the trainer's tests: a task, rewards, and engines whose behaviour is known."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from drpo.recipes.addition import smoke
from drpo.rewards import Reward, in_process
from drpo.train.config import Run, configure
from drpo.types import Problem, Sampling, TokenLoss, Tokens


@in_process
def digits(problem: Problem, text: str) -> float:
    """The share of characters that are digits: a random model can learn it in seconds."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


@in_process
def codes(problem: Problem, text: str) -> float:
    """The mean code of the characters, in thousands: two different texts hardly ever have the same."""
    return sum(map(ord, text)) / 1000 / max(1, len(text))


@in_process
def never(problem: Problem, text: str) -> float:
    return 0.0


@in_process
def begins_q(problem: Problem, text: str) -> float:
    """Whether a text begins with a q, which the random model writes once in 257."""
    return float(text.startswith("q"))


@in_process
def raising(problem: Problem, text: str) -> float:
    raise RuntimeError("no verdict today")


@in_process
def not_a_number(problem: Problem, text: str) -> float:
    return float("nan")


@in_process
def flaky(problem: Problem, text: str) -> float | None:
    """Fails, abstains or marks, by the number of characters."""
    if len(text) % 3 == 0:
        raise ValueError("a multiple of three")
    return None if len(text) % 3 == 1 else digits(problem, text)


@dataclass(frozen=True)
class Letters:
    """Problems that are single letters; the held-out ones are Greek."""

    mark: str = "digits"

    @property
    def reward(self) -> Reward:
        return globals()[self.mark]

    def sample(self, n: int, step: int, seed: int) -> list[Problem]:
        return [Problem.of_text(f"{step}-{i}", chr(ord("a") + (seed + step * n + i) % 26), "") for i in range(n)]

    def training_problems(self) -> list[Problem]:
        return [Problem.of_text(f"letter-{c}", c, "") for c in "abcdefghijklmnop"]

    def held_out(self, n: int) -> list[Problem]:
        return [Problem.of_text(f"held-out-{i}", chr(ord("\u03b1") + i % 24), "") for i in range(n)]


@dataclass(frozen=True)
class Broken:
    """An objective whose gradient is not a number."""

    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(tokens.logp * float("nan"))


class Plain:
    """An objective as someone would write it who has only read the contract."""

    tokenwise = True
    needs: frozenset[str] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        ratio = (tokens.logp - tokens.behavior_logp).exp()
        return TokenLoss(-ratio * tokens.advantage, {"mine": ratio.detach()})


LOSS = Plain()


def tiny_run(**changes: Any) -> Run:
    """The smoke recipe on `Letters`, where something can be learnt."""
    run = configure(smoke(), task=Letters(), precision="fp32", rollout_precision="fp32")
    return configure(run, **changes)


def sampling(**changes: Any) -> Sampling:
    return replace(smoke().rollout.sampling, **changes)


def few_run(**changes: Any) -> Run:
    """`tiny_run` of few and short completions, whose every step still has a gradient."""
    few = {"prompts": 2, "sampling": sampling(max_new_tokens=4), "eval_problems": 2}
    return tiny_run(**few | changes)


class _WhereMoved:
    """The unregularised surrogate, until a policy comes that is no longer the sampler's: then something happens."""

    tokenwise = True
    needs: frozenset[str] = frozenset()

    def __init__(self, happens: Callable[[Tokens], TokenLoss]) -> None:
        self._happens = happens

    def __call__(self, tokens: Tokens) -> TokenLoss:
        ratio = (tokens.logp - tokens.behavior_logp).exp()
        if bool((((ratio - 1).abs() > 1e-3) & (tokens.advantage != 0)).any()):
            return self._happens(tokens)
        return TokenLoss(-ratio * tokens.advantage)


def _exit(tokens: Tokens) -> TokenLoss:
    os._exit(3)


BREAKS_LATER = _WhereMoved(Broken())
EXITS = _WhereMoved(_exit)
