"""Scoring of mathematical answers by the library math-verify."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, product
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import NormalizationConfig

from drpo.errors import InputError
from drpo.rewards import nearness
from drpo.rewards.extract import final_answer, says_answer, stated, without_reason
from drpo.rewards.normalise import is_formula, is_number, normalise, normalise_text, split_label
from drpo.rewards.wording import Comparison, comparison, has_dots
from drpo.types import Problem

# The library's own removal of units is off: it takes the h of "\\pi r^2 h" and the ab of "2ab" for units.
_FORM = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
_GOLD = (LatexExtractionConfig(normalization_config=_FORM), ExprExtractionConfig())
_PREDICTION = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_FORM), ExprExtractionConfig())

# Longer or deeper text is a loop of the model, not an answer; the library would take minutes to parse it.
_LONGEST, _DEEPEST = 1000, 20
_INTEGRALS = 4
"""The limit per formula: the library's grammar took 1.2 s for five unclosed ones, and 16 s for twenty."""
_FORMULA = re.compile(r"[^$\n]+")

# The library warns in every process that its timeouts are off. They must be off: they use SIGALRM, which works on the
# main thread only and cannot interrupt C code. The pool kills the process instead.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.ERROR)

nearness.narrow()


def math_verify(problem: Problem, text: str) -> float:
    r"""Score by mathematical equality with the answer, as math-verify compares; words are compared as text.

    The compared part of the text is its last \boxed{...} (joined boxes form a set: "\boxed{1} and \boxed{2}") or its
    last <answer>...</answer>, else the text after "the answer is", else the last formula or number. Both answers are
    normalised first (`drpo.rewards.normalise`). A text that cannot be parsed scores 0; a reference answer that cannot
    be parsed raises. A hostile text may run for ever: use a `RewardPool`.

    Args:
        problem: `answer` is LaTeX or a plain expression, without delimiters: "\\frac{1}{2}", "336^\\circ", "27.0";
            or text: "even", "C", "2023-10-05".
        text: a completion.

    Returns:
        1.0 if they are equal, else 0.0.

    Raises:
        InputError: the problem's answer cannot be parsed.
        MemoryError: the process is out of memory.

    Example:
        >>> math_verify(Problem.of_text("0", "1 - 1/2?", r"\frac{1}{2}"), r"It is \boxed{0.5}.")
        1.0
        >>> math_verify(Problem.of_text("0", "Is 1 prime?", "no"), r"So \boxed{on}.")
        0.0
    """
    if compare := comparison(problem.answer):
        return float(_same_text(compare, text))
    label, answer = split_label(problem.answer)
    if label and (named := comparison(label)) and _same_text(named, text):
        return 1.0
    gold = _read_gold(answer)
    if not gold:
        raise InputError(f"problem {problem.id!r}: math-verify cannot read the answer {problem.answer!r}")
    longest = max(_LONGEST, 2 * len(answer))
    return float(any(_equal(*pair) for pair in product(gold, _prediction(text, longest))))


def _same_text(compare: Comparison, text: str) -> bool:
    marked = final_answer(text)
    answer = stated(text if marked is None else marked)
    return any(map(compare, [answer, without_reason(answer), *([] if marked is None else [marked])]))


def _prediction(text: str, longest: int) -> list[Any]:
    marked = final_answer(text)
    if marked is not None and (len(marked) > longest or _depth(marked) > _DEEPEST):
        return []
    if marked is not None and not says_answer(marked) and (read := _read(split_label(marked)[1], _PREDICTION)):
        return read
    text = text if marked is None else marked
    answer_line = stated(text)
    announced = says_answer(text)
    for answer in (answer_line, without_reason(answer_line)) if announced else (answer_line,):
        if is_number(answer) or (announced and is_formula(answer)):
            return _read(answer, _PREDICTION)
    return _parsed(normalise_text(text), _PREDICTION)


def _depth(answer: str) -> int:
    """Return how deeply braces are nested."""
    return max(accumulate((c == "{") - (c == "}") for c in answer), default=0)


@lru_cache(maxsize=1024)  # the completions of a group have one answer
def _read_gold(answer: str) -> tuple[Any, ...]:
    return tuple(_read(answer, _GOLD))


def _read(answer: str, extraction: Sequence[Any]) -> list[Any]:
    normal = normalise(answer)
    return [] if not normal or has_dots(normal) else _parsed(f"\\boxed{{{normal}}}", extraction)


# The library treats every exception as "not equal". A MemoryError must be raised instead.


def _parsed(text: str, extraction: Sequence[Any]) -> list[Any]:
    text = _FORMULA.sub(lambda formula: " " if formula[0].count(r"\int") > _INTEGRALS else formula[0], text)
    try:
        return list(parse(text, extraction, parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:
        return []


def _equal(gold: object, prediction: object) -> bool:
    try:
        same = verify(gold, prediction, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
        return bool(same) or nearness.equal_where_real(gold, prediction)
    except MemoryError:
        raise
    except Exception:
        return False
