"""What a reward reads and says: problems and verdicts, without tensors and without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""What one side said: `role`, `content`."""


FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a generation ended: a stop token, or `Sampling.max_new_tokens`."""


@dataclass(frozen=True)
class Problem:
    """One question with what is needed to mark an answer.

    Args:
        id: unique among the problems of one call to `Task.sample` or `Task.held_out`; seeds its samples.
        prompt: the user's message, text.
        answer: the reference answer, text; may be empty where the reward needs none.
        system: a system message, or None for the chat template's own.
        data: whatever else a scorer needs (JSON-like).
    """

    id: str
    prompt: str
    answer: str
    system: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


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
