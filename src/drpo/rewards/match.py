"""Scoring by comparing texts: the reply, or the answer that it marks, with the reference answer."""

import unicodedata
from dataclasses import dataclass

from drpo.rewards.contract import in_process
from drpo.rewards.extract import final_answer, stated
from drpo.types import Problem

_AROUND = " \"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb"
_AT_END = ".,;:!"


def normalised(text: str, case: bool = False) -> str:
    """Return a text as `ExactMatch` compares it.

    Characters are written in one way (Unicode NFKC), white space is one blank, quotes and marks of emphasis around the
    text are left out, so is punctuation at its end, and letters are small unless case counts. What would leave nothing
    is not done.

    Args:
        text: any text.
        case: whether case counts.

    Example:
        >>> normalised(' "New  York". '), normalised("**B**", case=True), normalised("?!")
        ('new york', 'B', '?')
    """
    spaced = " ".join(unicodedata.normalize("NFKC", text).split())
    bare = spaced.lstrip(_AROUND).rstrip(_AROUND + _AT_END) or spaced
    return bare if case else bare.casefold()


@in_process
@dataclass(frozen=True)
class ExactMatch:
    r"""Score 1 if the reply, or the answer that it marks, equals the reference answer; see `normalised`.

    The marked answer is the last `\boxed{}` or `<answer>` tag; without one, the rest of the line after the last "the
    answer is"; without that, the last line.

    Args:
        case: whether upper and lower case differ.

    Example:
        >>> problem = Problem.of_text("0", "The capital of France?", "Paris")
        >>> [ExactMatch()(problem, text) for text in ("paris.", "The answer is Paris.", "Paris is nice")]
        [1.0, 1.0, 0.0]
    """

    case: bool = False

    def __call__(self, problem: Problem, text: str) -> float:
        """Score a text.

        Args:
            problem: `answer` is any text.
            text: a completion.

        Returns:
            1.0 if they are equal, else 0.0.
        """
        answer, marked = normalised(problem.answer, self.case), final_answer(text)
        replies = (text, stated(text) if marked is None else marked)
        return float(any(normalised(reply, self.case) == answer for reply in replies))
