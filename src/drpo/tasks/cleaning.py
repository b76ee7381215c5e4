"""Cleaning of question sets: repeats, conflicting answers, and overlap with the evaluation set."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drpo.types import Message


@dataclass(frozen=True)
class Question:
    """A question of a data set, before any template.

    Args:
        text: the question.
        answer: the reference answer.
        row: the question's whole row.
        messages: the question as a list of messages; empty if it is one text.
    """

    text: str
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    messages: tuple[Message, ...] = field(default=(), compare=False, repr=False)


def collapse(questions: Iterable[Question]) -> tuple[list[Question], int, int]:
    """Keep one of each repeated question; drop questions whose answers disagree. White space is ignored in both.

    Args:
        questions: in any order.

    Returns:
        The kept questions in order of first appearance, how many rows repeat an earlier one, and how many different
        questions were dropped because of their answers.

    Example:
        >>> collapse([Question("1+1", "2"), Question("1 + 1", "2"), Question("0!", "0"), Question("0!", "1")])
        ([Question(text='1+1', answer='2')], 2, 1)
    """
    first: dict[str, Question] = {}
    conflicting: set[str] = set()
    repeats = 0
    for question in questions:
        key = _dense(question.text)
        earlier = first.setdefault(key, question)
        if earlier is not question:
            repeats += 1
            if _dense(earlier.answer) != _dense(question.answer):
                conflicting.add(key)
    return [question for key, question in first.items() if key not in conflicting], repeats, len(conflicting)


def without(questions: Sequence[Question], held_out: Iterable[Question], prefix: int | None) -> list[Question]:
    """Drop the questions that are also in the held-out set; white space and case are ignored.

    Args:
        questions: to train on.
        held_out: to evaluate on.
        prefix: number of first characters to compare, without white space, >= 1; None compares all.

    Returns:
        The remaining questions, in order.

    Example:
        >>> without([Question("What is 1+1?", "2"), Question("What is 2 + 2?", "4")],
        ...         [Question("what is 1 + 1?", "2")], prefix=None)
        [Question(text='What is 2 + 2?', answer='4')]
    """
    known = {_key(question, prefix) for question in held_out}
    return [question for question in questions if _key(question, prefix) not in known]


def _key(question: Question, prefix: int | None) -> str:
    return _dense(question.text).casefold()[:prefix]


def _dense(text: str) -> str:
    return "".join(text.split())
