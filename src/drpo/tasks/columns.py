"""Guesses what rows of a user's own data mean: which field is the question, which the answer, and how to score it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drpo.errors import InputError, nearest
from drpo.rewards.number import read_number
from drpo.tasks.rows import Row

_PROMPTS = (
    ("question", "prompt", "problem"),
    ("q", "input", "instruction", "query", "text", "user", "messages"),
)
_ANSWERS = (
    ("answer", "final_answer", "ground_truth", "reward_model.ground_truth"),
    ("a", "target", "label", "expected", "solution", "output", "response", "completion", "reference"),
)
"""Names that data sets use, without case; one of the first line wins over one of the second."""
_NESTED = "reward_model.ground_truth"
_MARK = "####"
"""Before the final answer of a solution, as in GSM8K."""


@dataclass(frozen=True)
class Guess:
    """A setting that was read off the data.

    Args:
        value: the setting.
        reason: why, for a line of the log; "" if the user said it.
    """

    value: str
    reason: str = ""


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the fields of the first rows, in order, with verl's nested answer.

    Example:
        >>> columns_of([{"q": "1 + 1?", "a": 2}, {"q": "2 + 2?", "level": 1}])
        ['q', 'a', 'level']
    """
    names = dict.fromkeys(name for row in rows[:100] for name in row)
    outer, _, inner = _NESTED.partition(".")
    nested = any(isinstance(row.get(outer), Mapping) and inner in row[outer] for row in rows[:1])
    return [*names, *([_NESTED] if nested else [])]


def guess_fields(columns: Sequence[str], prompt: str | None, answer: str | None, source: str) -> tuple[Guess, Guess]:
    """Return the fields of the question and of the answer.

    A field that is named is taken. Else one with a usual name; else, of two columns, the one that is left.

    Args:
        columns: names of the fields.
        prompt: the field of the question, if the user names it.
        answer: the field of the answer, if the user names it.
        source: the data, for messages.

    Raises:
        InputError: no field or several may be meant; the message lists the columns.

    Example:
        >>> question, answer = guess_fields(["id", "Question", "label"], None, None, "my.jsonl")
        >>> question.value, answer.value
        ('Question', 'label')
    """
    asked = _named(columns, prompt, "--prompt-field", source)
    said = _named(columns, answer, "--answer-field", source)
    asked = asked or _usual([name for name in columns if said is None or name != said.value], _PROMPTS)
    said = said or _usual([name for name in columns if asked is None or name != asked.value], _ANSWERS)
    if len(columns) == 2:
        asked = asked or _other(columns, said)
        said = said or _other(columns, asked)
    listed = f"the columns are {', '.join(columns)}"
    if asked is None or (said is not None and asked.value == said.value):
        raise InputError(f"{source}: which column is the question? Name it with --prompt-field; {listed}")
    if said is None:
        raise InputError(f"{source}: which column is the answer? Name it with --answer-field; {listed}")
    return asked, said


def guess_reward(answers: Sequence[str]) -> Guess:
    """Return the reward for reference answers: exact_number, math_verify or exact_match.

    Args:
        answers: of the questions to train on, at least one.

    Example:
        >>> [guess_reward(answers).value for answers in (["1,024", "-3"], ["\\\\frac{1}{2}", "x"], ["Paris"])]
        ['exact_number', 'math_verify', 'exact_match']
    """
    numbers = sum(read_number(answer) is not None for answer in answers)
    if numbers == len(answers):
        return Guess("exact_number", f"all {len(answers):,} answers are numbers")
    formula = next((answer for answer in answers if "\\" in answer or answer.startswith("$")), None)
    if formula is not None:
        return Guess("math_verify", f"there are formulas among the answers, such as {formula[:40]!r}")
    return Guess("exact_match", f"{len(answers) - numbers:,} of {len(answers):,} answers are no numbers")


def guess_mark(answers: Sequence[Any]) -> str | None:
    """Return the mark after which the final answer stands, if every answer has it.

    Example:
        >>> guess_mark(["1 + 1 = 2\\n#### 2", "#### 5"]), guess_mark(["2", "#### 5"])
        ('####', None)
    """
    texts = [answer for answer in answers if answer is not None]
    return _MARK if texts and all(isinstance(answer, str) and _MARK in answer for answer in texts) else None


def _named(columns: Sequence[str], name: str | None, option: str, source: str) -> Guess | None:
    if name is None:
        return None
    if name.partition(".")[0] not in columns:
        raise InputError(f"{source}: no column {name!r} ({option}){nearest(name, columns)}")
    return Guess(name)


def _usual(columns: Sequence[str], names: Sequence[Sequence[str]]) -> Guess | None:
    """The one column with a usual name, of the first line of names that has any; None if several have one."""
    for line in names:
        found = [column for column in columns if column.casefold() in line]
        if found:
            return Guess(found[0], "its usual name") if len(found) == 1 else None
    return None


def _other(columns: Sequence[str], taken: Guess | None) -> Guess | None:
    left = [column for column in columns if taken is not None and column != taken.value]
    return Guess(left[0], "the other column") if len(left) == 1 else None
