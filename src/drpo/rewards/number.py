"""Marking by the last number in the text; no parsing of mathematics, no failure modes, no child process."""

import re
from collections import deque
from decimal import Decimal

from drpo.errors import InputError
from drpo.rewards.contract import in_process
from drpo.types import Problem

# A minus belongs to the number unless something that it could be subtracted from stands right before it: "3-4" ends in
# 4, "= -4" in -4. Thousands may be grouped by "," and by LaTeX's "{,}" and ",\!".
_SPELLED = r"""
    (?P<minus>(?<![\w)\]}])[-\u2212])?
    (?:\\?\$)?
    (?P<digits>(?:[0-9]{1,3}(?:(?:\{,\}|,\\!|,)[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
    (?P<power>[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?
"""
_NUMBER = re.compile(_SPELLED, re.VERBOSE)
_UNIT = r"\\?% | \u00b0 | \^\s*\\circ | \^\s*\{\s*\\circ\s*\}"
_ANSWER = re.compile(rf"\s* \$? {_SPELLED} \s* (?:{_UNIT})? \s* \$? \s*", re.VERBOSE)


def _value(match: re.Match[str]) -> Decimal:
    digits = re.sub(r"[^0-9.]", "", match["digits"])
    return Decimal(("-" if match["minus"] else "") + digits + (match["power"] or ""))


def _answer(problem: Problem) -> Decimal:
    match = _ANSWER.fullmatch(problem.answer)
    if match is None:
        raise InputError(f"problem {problem.id!r}: exact_number needs a number as the answer, not {problem.answer!r}")
    return _value(match)


@in_process
def exact_number(problem: Problem, text: str) -> float:
    r"""Mark by whether the last number in the text equals the answer; decimals are compared exactly, never as floats.

    Thousands commas, dollar, degree and percent signs, leading zeros and a full stop at the end of a sentence do not
    matter; a minus does, unless it stands between two quantities ("3-4" ends in 4).

    Args:
        problem: its `answer` is a number such as "1,024", "025", "27.0", "$-3" or "336^\\circ".
        text: a completion.

    Returns:
        1.0 where they are equal, 0.0 where they are not or the text has no number.

    Raises:
        InputError: the problem's answer is not a number.

    Example:
        >>> exact_number(Problem("0", "What is 1000 + 24?", "1024"), "1000 + 24 makes $1,024.00.")
        1.0
        >>> exact_number(Problem("0", "What is 3 - 7?", "-4"), "it is 3-4")
        0.0
    """
    answer = _answer(problem)
    numbers = deque(_NUMBER.finditer(text), maxlen=1)
    return float(bool(numbers) and _value(numbers[-1]) == answer)
