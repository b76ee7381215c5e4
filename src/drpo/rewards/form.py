r"""Rewards of a completion's form: its tags, a pattern, its length. They do not look at the answer."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from drpo.errors import InputError, nearest
from drpo.rewards.contract import in_process
from drpo.rewards.extract import boxed
from drpo.types import Problem, Transcript

TAGS: Mapping[str, tuple[str, ...]] = {
    "think": ("<think>", "</think>"),
    "think_answer": ("<think>", "</think>", "<answer>", "</answer>"),
}
"""The tags of the forms that have a name."""
BOXED = "boxed"

Shape: TypeAlias = Literal["linear", "cosine"]


@in_process
@dataclass(frozen=True)
class Format:
    r"""Score 1 if a completion has a form, else 0.

    - `think`: a thought between <think> and </think>, then the answer (TRL's `think_format_reward`);
    - `think_answer`: the same with the answer between <answer> and </answer>, and nothing else (Open R1's format);
    - `boxed`: a whole \boxed{};
    - tags of your own, opening and closing in turn: `format(('<reasoning>', '</reasoning>'))`.

    Each tag is there exactly once, in this order; what is between a pair is not blank; before the first tag, between
    pairs, and after the last of several pairs there is white space alone.

    Args:
        form: a name, or tags.
        opened: the chat template itself writes the first tag at the end of the prompt, and the completion must not.
        partial: score a completion without the form by its tags: half the share of those that are there exactly once.

    Raises:
        InputError: an unknown name, or tags that are no pairs.

    Example:
        >>> problem = Problem.of_text("0", "1 + 1?", "2")
        >>> [Format()(problem, text) for text in ("<think>1 and 1</think> It is 2.", "It is 2.", "<think>2</think>")]
        [1.0, 0.0, 0.0]
        >>> Format(partial=True)(problem, "<think>2</think>"), Format("boxed")(problem, r"It is \boxed{2}.")
        (0.5, 1.0)
    """

    form: str | tuple[str, ...] = "think"
    opened: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.form, str):
            if self.form not in (*TAGS, BOXED):
                raise InputError(f"format form={self.form!r}{nearest(self.form, (*TAGS, BOXED))}")
        elif not self.form or len(self.form) % 2 or not all(isinstance(t, str) and t.strip() for t in self.form):
            raise InputError(f"format form={self.form!r}: must be a name, or tags in pairs: ('<think>', '</think>')")
        elif len(set(self.form)) < len(self.form):
            raise InputError(f"format form={self.form!r}: each tag must be another")
        if self.form == BOXED and (self.opened or self.partial):
            raise InputError(f"format form={self.form!r}: has no tags; leave opened and partial out")

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags, in order; none of the form `boxed`."""
        return TAGS.get(self.form, ()) if isinstance(self.form, str) else self.form

    def __call__(self, problem: Problem, text: str) -> float:
        """Score a text.

        Args:
            problem: unused.
            text: a completion.
        """
        if not self.tags:
            return float(boxed(text) is not None)
        text = self.tags[0] + text if self.opened else text
        once = [text.count(tag) == 1 for tag in self.tags]
        if all(once) and self._in_order(text):
            return 1.0
        return sum(once) / len(once) / 2 if self.partial else 0.0

    def _in_order(self, text: str) -> bool:
        pieces = []
        for tag in self.tags:
            before, tag, text = text.partition(tag)
            if not tag:
                return False
            pieces.append(before)
        wanted = [i % 2 == 1 for i in range(len(pieces))]  # text within the pairs alone
        return [bool(piece.strip()) for piece in (*pieces, text)] == [*wanted, len(self.tags) == 2]


@dataclass(frozen=True)
class Regex:
    r"""Score 1 if a regular expression matches the whole completion, white space around it aside, else 0.

    A point matches line ends too. It runs in a process with a time limit (`--reward-pool.seconds`), because there are
    texts on which an expression does not end.

    Args:
        pattern: of Python's `re`.

    Raises:
        InputError: no regular expression.

    Example:
        >>> Regex(r"<think>.+</think>.*\d")(Problem.of_text("0", "1 + 1?", "2"), "<think>one\nmore</think> 2")
        1.0
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"regex pattern={self.pattern!r}: {error}") from None

    def __call__(self, problem: Problem, text: str) -> float:
        """Score a text.

        Args:
            problem: unused.
            text: a completion.
        """
        return float(re.fullmatch(self.pattern, text.strip(), re.DOTALL) is not None)


@in_process
@dataclass(frozen=True)
class Length:
    """Score 1 up to `start` tokens, 0 from `limit` on, and less with each token between.

        linear: (limit - n) / (limit - start)        cosine: (1 + cos(pi (n - start) / (limit - start))) / 2

    n counts the tokens that the model sampled, of all turns. With `start` equal to `limit` it is 1 up to the limit, and
    0 beyond. A wrong answer may be short: `0.2*math_verify*length(256)` counts for right ones alone.

    Args:
        limit: tokens, >= 1.
        start: tokens, in [0, limit].
        shape: linear or cosine.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> answers = [Transcript("0", (), "", "stop", (n,)) for n in (50, 100, 150, 200, 900)]
        >>> [Length(200, start=100)(Problem.of_text("0", "?", ""), answer) for answer in answers]
        [1.0, 1.0, 0.5, 0.0, 0.0]

    Source: with a product, LCPO-Max of L1, arXiv 2503.04697, Eq. 2: clip(alpha (N - n) + 1/2, 0, 1) is that of
    start = N - 1 / (2 alpha), limit = N + 1 / (2 alpha). The cosine is that of arXiv 2502.03373.
    """

    limit: int
    start: int = 0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        for name in ("limit", "start"):
            if type(getattr(self, name)) is not int:
                raise InputError(f"length {name}={getattr(self, name)!r}: must be a whole number of tokens")
        if self.limit < 1:
            raise InputError(f"length limit={self.limit}: must be at least 1 token")
        if not 0 <= self.start <= self.limit:
            raise InputError(f"length start={self.start}: must be from 0 to limit={self.limit}")
        if self.shape not in get_args(Shape):
            raise InputError(f"length shape={self.shape!r}{nearest(str(self.shape), get_args(Shape))}")

    def __call__(self, problem: Problem, transcript: Transcript) -> float:
        """Score an episode.

        Args:
            problem: unused.
            transcript: of which the tokens are counted.
        """
        n = transcript.n_tokens
        if n <= self.start:
            return 1.0
        if n >= self.limit:
            return 0.0
        share = (n - self.start) / (self.limit - self.start)
        return 1 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2
