"""What a reward reads and returns: problems, transcripts and scores. No tensors, no torch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from drpo.errors import InputError

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `role` ("system", "user", "assistant"), `content`, and other keys that the chat template reads."""


FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a generation ended: a stop token, or `Sampling.max_new_tokens`."""


@dataclass(frozen=True)
class Problem:
    """One question, with the reference answer and data to score an answer.

    Args:
        id: unique among the problems of one call to `Task.sample` or `Task.held_out`; seeds its samples.
        messages: the prompt: a system message, if any, earlier turns (examples, or a conversation), and the user's.
        answer: the reference answer, text; may be empty where the reward needs none.
        data: further values for the reward (JSON-like).

    Raises:
        InputError: no messages, or a text in their place.

    Example:
        >>> Problem.of_text("0", "1 + 1?", "2", system="Be brief.").messages
        ({'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '1 + 1?'})
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    data: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        messages: Any = self.messages
        if isinstance(messages, str) or not messages:
            raise InputError(
                f"problem {self.id!r}: messages={repr(messages)[:60]}: must be messages with role and content; "
                "Problem.of_text(id, prompt, answer) builds them from a text"
            )

    @staticmethod
    def of_text(
        id: str,
        prompt: str,
        answer: str,
        system: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> "Problem":
        """Return a problem whose question is one text.

        Args:
            id: as the field.
            prompt: the user's message.
            answer: as the field.
            system: the system message, or None for the chat template's own.
            data: as the field.
        """
        first = [] if system is None else [message("system", system)]
        return Problem(id, (*first, message("user", prompt)), answer, data or {})

    @property
    def prompt(self) -> str:
        """The user's last message: the question, without system message and examples."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def message(role: str, text: str) -> Message:
    """Return a message with this role and content."""
    return {"role": role, "content": text}


@dataclass(frozen=True)
class Transcript:
    """An episode as a reward reads it: without tensors.

    Args:
        problem_id: `Problem.id` of the question.
        messages: the whole exchange, from the prompt's first message to the model's last.
        text: the last turn, without special tokens.
        finish_reason: the last turn's: "stop" for a stop token, "length" for the token limit.
        turns: sampled tokens of each turn, in order.
    """

    problem_id: str
    messages: tuple[Message, ...]
    text: str
    finish_reason: FinishReason
    turns: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Sampled tokens of all turns."""
        return sum(self.turns)

    @staticmethod
    def of_text(problem: Problem, text: str) -> "Transcript":
        """Return a transcript of one turn with this text, which no model sampled; each letter counts as a token."""
        messages = (*problem.messages, message("assistant", text))
        return Transcript(problem.id, messages, text, "stop", (max(1, len(text)),))


@dataclass(frozen=True)
class RewardResult:
    """A reward with named parts or rewards per turn.

    Args:
        total: reward of the whole episode, added at its end.
        parts: name -> component, for people: each is a metric and a curve. They need not add up to `total`.
        turns: rewards of each turn, in order, in addition to the total: one number, or one per sampled token of the
            turn; empty where turns have none.
        weights: name of a part -> its weight, where the reward is the weighted sum of these parts: `--advantage gdpo`
            compares each of them by itself. Empty where the reward is one whole.
        penalties: what the trainer adds to the reward of each sampled token, all turns in order: the KL to a reference
            (`drpo.credit.reference_kl`), at the last one the penalty of an overlong episode (`drpo.credit.overlong`).
            Not part of what the task gave; empty where there is none.

    Example:
        >>> RewardResult(1.5, {"right": 1.0, "short": 0.5}).total
        1.5
        >>> RewardResult(1.0, turns=(0.5, (0.0, -0.1, 0.0))).turns  # the second turn has three tokens
        (0.5, (0.0, -0.1, 0.0))
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    turns: tuple[float | tuple[float, ...], ...] = ()
    penalties: tuple[float, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def whole(self) -> float:
        """What the task gave: the total, and the rewards of all turns."""
        return self.total + sum(sum(t) if isinstance(t, tuple) else t for t in self.turns)

    @staticmethod
    def of_floats(
        total: Any, parts: Mapping[Any, Any], turns: Iterable[Any], weights: Mapping[Any, Any]
    ) -> "RewardResult":
        """Return a result of plain floats; a turn's list becomes a tuple."""
        named, weighted = ({str(name): float(part) for name, part in values.items()} for values in (parts, weights))
        per_turn = (tuple(map(float, t)) if isinstance(t, list | tuple) else float(t) for t in turns)
        return RewardResult(float(total), named, tuple(per_turn), weights=weighted)


LARGEST_REWARD = 1e30
"""Of one reward, so that the sums over turns, tokens and groups fit float32, in which advantages are trained."""


def is_reward(number: float) -> bool:
    """Whether a number can be trained on: it is finite, and at most 1e30 in size.

    Example:
        >>> is_reward(-2.5), is_reward(1e39), is_reward(float("nan"))
        (True, False, False)
    """
    return abs(number) <= LARGEST_REWARD


def not_a_reward(number: float) -> str:
    """Return a number for which `is_reward` is false, for a message."""
    return f"{number}, above {LARGEST_REWARD:g} in size" if math.isfinite(number) else str(number)


FailureKind: TypeAlias = Literal["raised", "timed_out", "died", "not_finite", "not_a_number"]
"""How a reward or an environment can fail: it raised, exceeded its deadline, lost its process, returned NaN, an
infinity or a number above 1e30 in size, or returned something that is not a number (text, a list, an array), or not an
environment's answer."""


@dataclass(frozen=True)
class Failure:
    """Why a reward returned no score, or an environment no answer. A failure is not a wrong answer.

    Args:
        kind: see `FailureKind`; counted by kind.
        text: what happened, one line.
    """

    kind: FailureKind
    text: str
