"""Marking of mathematics by the library math-verify."""

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from drpo.errors import InputError
from drpo.types import Problem

_GOLD = (LatexExtractionConfig(), ExprExtractionConfig())
_PREDICTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

# The library warns in every process that its own timeouts are off. They have to be: they are built on SIGALRM, which
# works on the main thread only and cannot interrupt C code. The pool kills the process instead.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def math_verify(problem: Problem, text: str) -> float:
    r"""Mark by mathematical equality with the answer, as math-verify extracts and compares.

    The text's last \boxed{...} counts first (with others close before it, as a set: "\boxed{1} and \boxed{2}"), then
    what follows "the final answer is", then the last formula or number. A text that cannot be read scores 0; an answer
    that cannot be read is an error, not a 0. It may run for ever on a hostile text, so it belongs into a `RewardPool`.

    Args:
        problem: its `answer` is LaTeX or a plain expression, without delimiters: "\\frac{1}{2}", "336^\\circ", "27.0".
        text: a completion.

    Returns:
        1.0 where they are equal, else 0.0.

    Raises:
        InputError: the problem's answer cannot be read.
        MemoryError: there was not enough.

    Example:
        >>> math_verify(Problem("0", "1 - 1/2?", r"\frac{1}{2}"), r"It is \boxed{0.5}.")
        1.0
        >>> math_verify(Problem("0", "1 - 1/2?", r"\frac{1}{2}"), "I do not know.")
        0.0
    """
    gold = _parsed(f"\\boxed{{{problem.answer}}}", _GOLD) if problem.answer.strip() else []
    if not gold:
        raise InputError(f"problem {problem.id!r}: math-verify cannot read the answer {problem.answer!r}")
    return float(any(_equal(*pair) for pair in product(gold, _parsed(text, _PREDICTION))))


# The library takes any exception for "not equal". One that says that the process is out of memory is no verdict.


def _parsed(text: str, how: Sequence[Any]) -> list[Any]:
    try:
        return list(parse(text, how, parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:
        return []


def _equal(gold: object, prediction: object) -> bool:
    try:
        return bool(verify(gold, prediction, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:
        return False
