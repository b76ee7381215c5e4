r"""Scoring by the last number in the text, in exact arithmetic; no parsing of mathematics, no child process.

Accepted numbers: 1,024  1{,}024  1\,024  1 024 (thin or no-break spaces)  -5  $-5$  - 5  negative 5  .5
1e-05  1.2 \times 10^3  10^3  10**3  10³  2 million  1/2  \frac12  \frac{1}{2}  1 1/2  1\frac12  ½  and any of it in
full-width characters.
"""

import re
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

from drpo.errors import InputError
from drpo.rewards.characters import plain_characters
from drpo.rewards.contract import in_process
from drpo.types import Problem

_GAP = r"(?:\s|\\[,;:!\ ]|~)"
_SEPARATOR = r"\{,\}|,\\!\ ?|,|\\,|[\u00a0\u2007\u2009\u202f]"
# "1 234" is a list inside a sentence, and one number if it is the whole answer.
_SPACED = r"(?:\A|(?<=is\ )|(?<==)|(?<==\ )|(?<=[-\u2212\u2013$({]))[1-9][0-9]{0,2}(?:\ [0-9]{3})+(?!\ ?[0-9])"
_POWER = r"(?:\s*\^\s*|\*\*(?=[-\u2212{0-9]))"  # "**5** 3" is bold


def _raised(name: str) -> str:
    """The pattern of "^3", "^{-3}" or "**3"."""
    return rf"{_POWER}(?:\{{\s*(?P<{name}>[-+\u2212]?[0-9]+)\s*\}}|(?P<bare_{name}>[-+\u2212]?[0-9]+)(?!\.?[0-9]))"


_NUMBER_PART = rf"""
    (?:(?P<minus>[-\u2212\u2013\u2010\u2011]|\b(?:minus|negative)\b)(?P<gap>{_GAP}{{0,3}}))?
    (?:\\?[$\u20ac\u00a3\u00a5]\s?)?
    (?:
        (?:(?P<units>[0-9]{{1,9}}){_GAP}?)? \\[dtc]?frac\s*
        (?:\{{\s*(?P<top>[-\u2212]?[0-9]{{1,99}})\s*\}}|(?P<short_top>[0-9]))\s*
        (?:\{{\s*(?P<bottom>[0-9]{{1,99}})\s*\}}|(?P<short_bottom>[0-9]))
      | (?P<mixed>[0-9]{{1,9}})\ (?P<part>[0-9]{{1,9}})/(?P<parts>[0-9]{{1,9}})(?![0-9/.])
      | (?P<digits>(?:[0-9]{{1,3}}(?P<sep>{_SEPARATOR})[0-9]{{3}}(?:(?P=sep)[0-9]{{3}})*(?![0-9])|{_SPACED}|[0-9]+)
          (?:\.[0-9]+)?
          |\.[0-9]+)
        (?:
            (?P<power>[eE][-+\u2212]?[0-9]{{1,3}}(?![0-9A-Za-z]))
          | \s*(?:\\times|\\cdot|[*x\u00d7\u00b7])\s*10{_raised("shift")}
          | (?P<raised>{_raised("exponent")}) (?P<tower>\s*\^\S*|\*\*[0-9{{]\S*)?
          | (?P<over>(?:\s?/\s?[0-9]+(?:\.[0-9]+)?)+)
          | \s(?P<scale>thousand|million|billion|trillion)\b
        )?
    )
"""
_STRAY = r"(?P<stray>(?:\^|(?<=[\w)\]}])\*\*)\s*\{?\s*[-\u2212]?[0-9][0-9.]*)"
_NUMBER = re.compile(rf"{_STRAY} | {_NUMBER_PART}", re.VERBOSE | re.IGNORECASE)
_UNIT = r"\\?% | \u00b0 | \^\s*\\circ | \^\s*\{\s*\\circ\s*\}"
_WHOLE = re.compile(rf"\s* \$? {_NUMBER_PART} \s* (?:{_UNIT})? \s* \$? \s* \.? \s*", re.VERBOSE | re.IGNORECASE)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_MAX_DIGITS = 20_000
_MAX_BITS = 200_000  # limit on a power: 10^10^10 is not computed

# A minus followed by a space is a sign after these. After anything else it subtracts ("3 - 4") or is a dash.
_SIGN_FOLLOWS = re.compile(
    r"(?:[=<>\u2264\u2265\u2248:({\[,+*/^&$]|\\(?:approx|equiv|leq?|geq?|to|cdot|times)|"
    r"\b(?:is|are|was|be|by|of|or|and|to|equals?|gives?|get|becomes)(?:\s+\$)?)(?:\s|\\[,;:!\ ]|~|\*)*\Z",
    re.IGNORECASE,
)


def read_number(text: str) -> Fraction | None:
    r"""Return the value of a text that is one number, optionally with a sign, currency, percent or degree sign.

    Args:
        text: "1,024", "$-3", "336^\\circ", "\\frac12".

    Returns:
        The exact value; None for any other text, or a value too large to write out.

    Example:
        >>> read_number("1 1/4"), read_number("-1\\,234.5"), read_number("10^10^10"), read_number("3-4")
        (Fraction(5, 4), Fraction(-2469, 2), None, None)
    """
    match = _WHOLE.fullmatch(plain_characters(text))
    return _value(match, negative=match["minus"] is not None) if match else None


def last_number(text: str) -> Fraction | None:
    """Return the value of the last number in a text; None without one, or if it is too large ("10^10^10").

    Example:
        >>> last_number("First 3, then x = - 5."), last_number("pages 3-4"), last_number("5 cm^2"), last_number("1/0")
        (Fraction(-5, 1), Fraction(4, 1), Fraction(5, 1), None)
    """
    text = plain_characters(text)
    numbers = deque(_numbers(text), maxlen=1)
    return _value(numbers[-1], _is_sign(text, numbers[-1])) if numbers and not numbers[-1]["stray"] else None


def _numbers(text: str) -> Iterator[re.Match[str]]:
    """Yield the numbers; skip exponents of letters ("5 cm^2"); an exponent of brackets is not a number ("(3+4)^2")."""
    return (m for m in _NUMBER.finditer(text) if not (m["stray"] and m.start() and text[m.start() - 1].isalpha()))


def _is_sign(text: str, match: re.Match[str]) -> bool:
    """Whether a minus belongs to the number: "x = -4", "is - 4", but not "3-4" or "3 - 4"."""
    minus = match["minus"]
    if not minus or minus.casefold() == "negative":
        return bool(minus)
    before = text[max(0, match.start() - 40) : match.start()]
    if not match["gap"]:
        return not re.search(r"[\w)\]}]\Z", before)
    if not before.strip() and match.start() < 40:
        return minus == "\u2212" or read_number(text) is not None
    return bool(_SIGN_FOLLOWS.search(before))


def _value(match: re.Match[str], negative: bool) -> Fraction | None:
    size = _size(match)
    return -size if negative and size is not None else size


def _size(match: re.Match[str]) -> Fraction | None:
    if match["digits"]:
        return _decimal(match)
    top = match["part"] or match["top"] or match["short_top"]
    bottom = int(match["parts"] or match["bottom"] or match["short_bottom"])
    units = int(match["mixed"] or match["units"] or 0)
    return units + Fraction(int(top.replace("\u2212", "-")), bottom) if bottom else None


def _decimal(match: re.Match[str]) -> Fraction | None:
    digits = re.sub(r"[^0-9.]", "", match["digits"])
    if len(digits) > _MAX_DIGITS:
        return None
    value = Fraction(Decimal(digits))
    if match["power"]:
        return value * Fraction(10) ** _integer(match["power"][1:])
    if match["raised"]:
        return None if match["tower"] else _power(value, match["exponent"] or match["bare_exponent"])
    if ten := match["shift"] or match["bare_shift"]:
        power = _power(Fraction(10), ten)
        return None if power is None else value * power
    if match["scale"]:
        return value * Fraction(10) ** _SCALES[match["scale"].casefold()]
    return _over(value, match["over"]) if match["over"] else value


def _power(base: Fraction, exponent: str) -> Fraction | None:
    if len(exponent) > 6:
        return None
    power = _integer(exponent)
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if bits * abs(power) > _MAX_BITS or (not base and power <= 0):
        return None
    return Fraction(base**power)


def _over(top: Fraction, over: str) -> Fraction | None:
    """Return a fraction; for "10/05/2023", which is not a fraction, the last number."""
    parts = [part.strip() for part in over.split("/")[1:]]
    if len(parts[-1]) > _MAX_DIGITS:
        return None
    last = Fraction(Decimal(parts[-1]))
    if len(parts) > 1:
        return last
    return top / last if last else None


def _integer(text: str) -> int:
    return int(text.replace("\u2212", "-"))


@in_process
def exact_number(problem: Problem, text: str) -> float:
    r"""Score 1 if the last number in the text equals the answer; both are exact fractions, never floats.

    Ignored are thousands separators, currency, degree and percent signs, leading zeros, and a full stop at the end of a
    sentence. A minus between two quantities is not a sign ("3-4" ends in 4). "1/2", "10^3" and "1.2e3" are one number
    each.

    Args:
        problem: `answer` is a number such as "1,024", "025", "27.0", "$-3", "1/2" or "336^\\circ".
        text: a completion.

    Returns:
        1.0 if they are equal; 0.0 if not, or if the text has no number.

    Raises:
        InputError: the problem's answer is not a number.

    Example:
        >>> exact_number(Problem.of_text("0", "What is 1000 + 24?", "1024"), "1000 + 24 makes $1,024.00.")
        1.0
        >>> exact_number(Problem.of_text("0", "What is 3 - 7?", "-4"), "it is 3-4")
        0.0
    """
    answer = read_number(problem.answer)
    if answer is None:
        raise InputError(f"problem {problem.id!r}: exact_number needs a number as the answer, not {problem.answer!r}")
    return float(last_number(text) == answer)
