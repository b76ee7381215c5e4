r"""Compares answers as text where math-verify would misread them.

math-verify reads a word as a product of letters ("no" = n o = "on"), a date as a difference, and a list with dots as
any list; it ignores the base of a numeral.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from math import gcd

from drpo.rewards.characters import plain_characters
from drpo.rewards.normalise import split_label

Comparison = Callable[[str], bool]

_WRAPPER = re.compile(
    r"\\(?:textbf|textit|textrm|textsf|texttt|text|mathbf|mathit|mathrm|mathsf|mbox|bm|boldsymbol|emph|underline|"
    r"operatorname|overline)\s*(?=\{)"
)
_SPACE = re.compile(r"\\(?:[ ,;:!]|quad|qquad|left|right)(?![A-Za-z])|~|\$|\\[()\[\]](?=\s|$)|\*\*|\\displaystyle")
_DOTS = re.compile(r"\\(?:ldots|cdots|dots|dotsc|dotsb)(?![A-Za-z])|\u2026|\.{3,}")
_DASH = re.compile(r"[\u2010-\u2015\u2212]|--+")
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\w\w)")
_MATH_WORD = re.compile(
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|lg|exp|sqrt|pi|infinity|min|max|gcd|lcm|mod|and|or|"
    "in|if|for|where|cis|deg|det|dim|ker|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|chi|psi|omega"
)
_MONTH_OR_DAY = re.compile(
    r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|sat|sun)(?:[a-z]*(?:day|ber|ry|"
    r"ch|il|ne|ly|st))?\b",
    re.IGNORECASE,
)
# Adjacent letters that are a product, not a word: "xy", "abc", "mn".
_PRODUCT = re.compile(r"[b-df-hj-np-tv-z]{2,3}|[a-d]{2,4}|a[mnp-z]|[mnp-z]a")
_BASE = re.compile(
    r"(?<![A-Za-z\\])\(?([0-9][0-9A-Fa-f]*(?:\.[0-9]+)?)\)?\s*(?:_\s*[{(\s]*([0-9]+|[a-z]{3,})[)}\s]*|\(?\s*base\s+([0-9]+|[a-z]+)\s*\)?)"
)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_BASES |= {"ten": "10", "twelve": "12", "sixteen": "16"}
_GROUPED = re.compile(r"[0-9]+(?:(?:-[0-9]+)+|(?:/[0-9]+){2,}|(?:\.[0-9]+){2,}|(?::[0-9]+){2,})")
_TIME = re.compile(r"([0-9]{1,2}):([0-5][0-9])\s*([ap])?\.?\s*(?:m\.?)?")
_QUOTES = re.compile(r"[\s*$\"'`\u201c\u201d\u2018\u2019]+(?=[.]?\Z)|\A[\s*$\"'`\u201c\u201d\u2018\u2019]+|\\[()\[\]]")
_CHOICE = r"(?:\(\s*{letter}\s*\)|{letter}\s*[.:)]|{letter}(?=\s*$))"


def plain(answer: str) -> str:
    r"""Return an answer without mark-up, case, articles and surrounding punctuation, its white space collapsed.

    Example:
        >>> plain(r"\text{The Ellipse}."), plain("**No**"), plain(r"1,\ 2, \ldots, n")
        ('ellipse', 'no', '1, 2, ..., n')
    """
    answer = _dressed(answer).replace("{", "").replace("}", "").casefold()
    answer = re.sub(r"\s+", " ", answer).strip(" \"'`*_\u201c\u201d\u2018\u2019")
    return _ARTICLE.sub("", answer if answer.endswith("...") else answer.rstrip(".,;:! "))


def _dressed(answer: str) -> str:
    """Return the answer without wrappers, with plain dashes and dots."""
    answer = unicodedata.normalize("NFC", plain_characters(answer))
    return _DASH.sub("-", _DOTS.sub("...", _SPACE.sub(" ", _WRAPPER.sub("", answer)))).strip()


@lru_cache(maxsize=1024)
def comparison(gold: str) -> Comparison | None:
    r"""Return the comparison for a reference answer that is text; None if it is mathematics.

    Args:
        gold: the problem's answer.

    Returns:
        A function that returns whether a text's answer equals the reference.

    Example:
        >>> comparison("no")("on"), comparison("C")("(C) 12"), comparison("1011_2")("1011_3"), comparison("2x") is None
        (False, True, False, True)
    """
    dressed = _dressed(gold)
    if letter := re.fullmatch(r"\{?\(?\{?([A-J])\}?\)?\.?\}?", dressed):
        return lambda answer: choice(answer) == letter[1]
    if _is_words(dressed) or _has_dots(dressed):
        return lambda answer: _dense(answer) == _dense(gold)
    if _GROUPED.fullmatch(dressed.strip("{}")):
        return lambda answer: _groups(answer) == _groups(gold)
    if (time := _time(dressed)) and (time[2] or gcd(*time[:2]) != 1):
        return lambda answer: _same_time(time, _time(_dressed(answer)))
    if _BASE.search(dressed):
        return lambda answer: _same_in_base(_in_base(gold), _in_base(answer))
    return None


def has_dots(answer: str) -> bool:
    r"""Whether an answer has an ellipsis ("1, 2, \\ldots"); dots after a decimal ("0.333...") do not count.

    Example:
        >>> has_dots(r"1, 2, \\ldots, n"), has_dots("0.333...")
        (True, False)
    """
    return _has_dots(_dressed(answer))


def _has_dots(dressed: str) -> bool:
    return "..." in re.sub(r"(?<=[0-9]\.)([0-9]+)\s*\.\.\.\s*$|(?<=\.)([0-9]+)\.\.\.(?!\w)", "", dressed)


def _is_words(dressed: str) -> bool:
    bare = re.sub(r"[{}]", "", dressed)
    words = [w for w in re.findall(r"(?<![\\A-Za-z])[^\W\d_]+", bare)]
    longer = [w for w in words if _is_word(w)]
    if not longer or re.search(r"[=<>+^_\\|*]", bare):
        return False
    if not re.search(r"[0-9]", bare):
        return not re.search(r"[()\[\]]", bare) or len(longer) == len(words)
    # With digits, only a name ("Grade 5") or a date is text; a number with a unit is not.
    return bool(_MONTH_OR_DAY.search(bare)) or bool(re.match(r"[^\W\d_]{3,}", bare) and _is_word(words[0]))


def _is_word(letters: str) -> bool:
    if not letters.isascii():
        return len(letters) > 1 or unicodedata.category(letters) == "Lo"
    return len(letters) > 1 and not _MATH_WORD.fullmatch(letters.lower()) and not _PRODUCT.fullmatch(letters)


def _dense(answer: str) -> str:
    answer = re.sub(r"\s", "", plain(answer))
    return re.sub(r"\\[,;]", "", answer)


def _groups(answer: str) -> tuple[int, ...] | None:
    text = plain(answer).replace(" ", "")
    return tuple(int(part) for part in re.findall("[0-9]+", text)) if _GROUPED.fullmatch(text) else None


def _time(dressed: str) -> tuple[int, int, str] | None:
    match = _TIME.fullmatch(re.sub(r"[{}]", "", dressed).casefold().strip(" ."))
    return (int(match[1]), int(match[2]), match[3] or "") if match else None


def _same_time(gold: tuple[int, int, str], answer: tuple[int, int, str] | None) -> bool:
    return answer is not None and gold[:2] == answer[:2] and (gold[2] == answer[2] or not (gold[2] and answer[2]))


def _in_base(answer: str) -> tuple[str, str]:
    """Return the answer with its bases, and without."""
    dressed = re.sub(r"(?<=[0-9A-Fa-f])[, ](?=[0-9A-Fa-f]{3,4}(?![0-9]))", "", _dressed(answer).casefold())

    def name(match: re.Match[str]) -> str:
        base = match[2] or match[3]
        return f"{match[1].lstrip('0') or '0'}_{_BASES.get(base, base)}"

    with_bases = re.sub(r"[\s{}.]", "", _BASE.sub(name, dressed))
    return with_bases, re.sub(r"_[0-9a-z]+", "", with_bases)


def _same_in_base(gold: tuple[str, str], answer: tuple[str, str]) -> bool:
    """Whether two numerals are equal; one without a base is read in the other's base."""
    return gold[0] == answer[0] or ("_" not in answer[0] and gold[1] == answer[0])


def choice(answer: str) -> str | None:
    r"""Return the letter of the choice that an answer names; None if it names none or several.

    Args:
        answer: "C", "(c)", "C. 12", "Option C", "\\textbf{(C)}\\ 7".

    Example:
        >>> choice("C. 12"), choice(r"\textbf{(C)}\ 7"), choice("option (c)"), choice("B or C"), choice("C = 12")
        ('C', 'C', 'C', None, None)
    """
    answer = _QUOTES.sub("", answer)
    label, rest = split_label(answer)
    dressed = _dressed(answer).strip("_ ")
    if label:
        return (
            None if re.search(rf"{_CHOICE.format(letter='[A-J]')}|\b(?:or|and)\s+\(?[A-J]\b", _dressed(rest)) else label
        )
    lead = (
        r"\{{0,3}(?:(?:thus|hence|so|therefore),?\s+)?"
        r"(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice)\s*(?:is\s*:?|:)?\s*)?"
    )
    match = re.fullmatch(
        rf"(?i:{lead})\{{{{0,3}}\(?\{{?\s*([A-Ja-j])\s*\}}?\)?\}}*\s*[.:]?\s*(?i:is\s+(?:correct|right|the\s+answer)\.?)?",
        dressed,
    )
    return match[1].upper() if match else None
