"""What a reward reads and returns: problems, transcripts and scores, without tensors and without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from drpo.errors import InputError

Message: TypeAlias = Mapping[str, Any]
"""What one side said: `role` ("system", "user", "assistant"), `content`, and what else the chat template reads."""


FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a generation ended: a stop token, or `Sampling.max_new_tokens`."""


@dataclass(frozen=True)
class Problem:
    """One question with what is needed to score an answer.

    Args:
        id: unique among the problems of one call to `Task.sample` or `Task.held_out`; seeds its samples.
        messages: the prompt: a system message, if any, earlier turns (examples, or a conversation), and the user's.
        answer: the reference answer, text; may be empty where the reward needs none.
        data: whatever else a scorer needs (JSON-like).

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
                "Problem.of_text(id, prompt, answer) makes them of a text"
            )

    @staticmethod
    def of_text(
        id: str,
        prompt: str,
        answer: str,
        system: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> "Problem":
        """A question that is one text.

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
        """The text of the user's last message: the question, without system message and examples."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), "")


def message(role: str, text: str) -> Message:
    """Return the message of one side."""
    return {"role": role, "content": text}


@dataclass(frozen=True)
class Transcript:
    """An episode as a reward reads it: without tensors.

    Args:
        problem_id: `Problem.id` of the question.
        messages: those exchanged, from the first of the prompt to the model's last.
        text: of the last turn, without special tokens.
        finish_reason: of the last turn: "stop" where a stop token ended it, "length" where the limit of tokens did.
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
        """A text as the only turn of an episode, where no model sampled it; its tokens are taken to be its letters."""
        messages = (*problem.messages, message("assistant", text))
        return Transcript(problem.id, messages, text, "stop", (max(1, len(text)),))


@dataclass(frozen=True)
class RewardResult:
    """What a reward returns that has more to say than one number.

    Args:
        total: reward of the whole episode, which counts at its end.
        parts: name -> what it consists of, for people: each is a metric and a curve. They need not add up to `total`.
        turns: rewards of each turn, in order, beside the total: one number, or one for each of the turn's sampled
            tokens; empty where turns have none.

    Example:
        >>> RewardResult(1.5, {"right": 1.0, "short": 0.5}).total
        1.5
        >>> RewardResult(1.0, turns=(0.5, (0.0, -0.1, 0.0))).turns  # the second turn has three tokens
        (0.5, (0.0, -0.1, 0.0))
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict)
    turns: tuple[float | tuple[float, ...], ...] = ()

    @staticmethod
    def of_floats(total: Any, parts: Mapping[Any, Any], turns: Iterable[Any]) -> "RewardResult":
        """Make plain floats of any numbers; a list of a turn's is a tuple afterwards."""
        named = {str(name): float(part) for name, part in parts.items()}
        per_turn = (tuple(map(float, t)) if isinstance(t, list | tuple) else float(t) for t in turns)
        return RewardResult(float(total), named, tuple(per_turn))


FailureKind: TypeAlias = Literal["raised", "timed_out", "died", "not_finite", "not_a_number"]
"""What can go wrong with a reward: it raised, it ran past its deadline, its process died, it returned NaN or an
infinity, or it returned something that is not a number: text, a list, an array."""


@dataclass(frozen=True)
class Failure:
    """Why a reward has no verdict. A failure is not a wrong answer.

    Args:
        kind: of the kinds that are counted.
        text: what happened, one line.
    """

    kind: FailureKind
    text: str
