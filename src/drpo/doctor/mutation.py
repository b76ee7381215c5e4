"""Mutation test of a reward: it must reject wrong answers derived from right ones."""

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from drpo.doctor.finding import Finding, judge
from drpo.rewards import Scored
from drpo.rewards.normalise import normalise
from drpo.rewards.number import read_number
from drpo.rewards.wording import plain
from drpo.types import Problem

PROBLEMS = 8
"""The number of problems whose answers are mutated."""

_BITS = 10_000  # Python formats no longer integers

ANOTHERS = "another's"


class Mutation(NamedTuple):
    """A wrong answer to a problem, and its kind of mutation."""

    problem: Problem
    kind: str
    answer: str


def mutate(problems: Sequence[Problem]) -> list[Mutation]:
    """Return wrong answers: plus one, the other sign, two digits swapped, and the answer of another problem.

    Skipped are mutations equal to the right answer, and other problems' answers with the same value ("15" and "15 cm",
    "50%" and "0.5") or the same characters apart from brackets ("1,2" and "(2,1)"). An answer that is not a number
    (text, a formula, a program) is only replaced by another problem's.

    Args:
        problems: the first `PROBLEMS` with a reference answer are used.

    Example:
        >>> [m.answer for m in mutate([Problem.of_text("0", "", "12"), Problem.of_text("1", "", "even")])]
        ['13', '-12', '21', 'even', '12']
    """
    answered = [p for p in problems if p.answer.strip()][:PROBLEMS]
    return [
        Mutation(p, kind, wrong)
        for i, p in enumerate(answered)
        for kind, wrong in _wrong(p.answer, [other.answer for other in answered[i + 1 :] + answered[:i]])
    ]


def _wrong(answer: str, others: Sequence[str]) -> list[tuple[str, str]]:
    value = read_number(answer)
    made = [] if value is None or value.numerator.bit_length() > _BITS else _near(value)
    another = next((other for other in others if not _same(answer, other)), None)
    return made + ([] if another is None else [(ANOTHERS, another)])


def _near(value: Fraction) -> list[tuple[str, str]]:
    swapped = _swapped(value)
    near = [("one more", value + 1), ("sign flipped", -value), ("digits swapped", swapped)]
    return [(kind, _written(wrong)) for kind, wrong in near if wrong != value]


def _swapped(value: Fraction) -> Fraction:
    """Swap the first two adjacent digits that differ; return the number unchanged if there are none."""
    digits = str(abs(value.numerator)) if value.denominator == 1 else ""
    for i, (a, b) in enumerate(pairwise(digits)):
        if a != b:
            return Fraction(int(digits[:i] + b + a + digits[i + 2 :])) * (-1 if value < 0 else 1)
    return value


def _written(value: Fraction) -> str:
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return f"{decimal:f}" if Fraction(decimal) == value else str(value)


def _same(answer: str, other: str) -> bool:
    a, b = _values(answer), _values(other)
    return bool(a & b) if a and b else _characters(answer) == _characters(other)


def _values(answer: str) -> set[Fraction]:
    """Return the values of an answer: 9 and 9/100 for "9%"; none if it is not a number."""
    value = read_number(normalise(answer))
    return set() if value is None else {value, value / 100} if "%" in answer else {value}


def _characters(answer: str) -> list[str]:
    return sorted(re.sub(r"[\s{}()\[\]]", "", plain(normalise(answer))))


def mutated(tried: Sequence[Mutation], scores: Sequence[Scored]) -> Finding:
    """Report the wrong answers that score 1 or more.

    Args:
        tried: the wrong answers.
        scores: their scores, in order.
    """
    fooled = [m for m, scored in zip(tried, scores, strict=True) if (scored.score or 0.0) >= 1.0]
    share = len(fooled) / len(tried) if tried else 0.0
    advice = ""
    if fooled:
        first = fooled[0]
        advice = (
            f"{first.answer!r} ({first.kind}) scores 1 where the answer is {first.problem.answer!r} "
            f"(problem {first.problem.id!r})"
        )
    verdict, advice = judge(not fooled, advice)
    only = (
        "" if any(m.kind != ANOTHERS for m in tried) else "; no answer is a number: only other problems' answers tried"
    )
    figure = f"{len(fooled)} of {len(tried)} mutated reference answers score 1 ({share:.0%}){only}"
    return Finding(
        "mutated",
        verdict,
        figure if tried else "no reference answers to mutate",
        "0",
        advice,
        {"tried": len(tried), "scored_1": len(fooled), "share": share},
    )
