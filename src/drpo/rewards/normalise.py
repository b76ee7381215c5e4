r"""Rewrites answers into the LaTeX that math-verify parses.

Models and data sets also write `10\,000`, `1 1/4`, `√2` or `5 dollars`, which math-verify reads as products or cannot
read. `RULES` are applied both to the problem's answer and to the text's.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from drpo.rewards.characters import plain_characters
from drpo.rewards.number import read_number

_SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "\u00d7": r"\times ", "÷": "/", "·": r"\cdot ", "⋅": r"\cdot ", "≤": r"\le ",
    "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "\u222a": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "Ø": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "\u2212": "-",
    "…": r"\ldots ", "\u2044": "/", "\u2215": "/", "\u03b1": r"\alpha ", "β": r"\beta ", "θ": r"\theta ",
    "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ",
}  # fmt: skip
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "dozen": 0}
# Words after a number that are not units: they change its value or are operators.
_NO_UNIT = (
    "hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|quarters?|percent|plus|minus|times|over|and|or|to|"
    "by|pi|sqrt|root|squared|cubed|factorial|mod|modulo|base|sin|cos|tan|cot|sec|csc|log|exp|not|less|more|least|most|than|"
    "if|for|infinity|at|is|are|between|alpha|beta|gamma|delta|theta|lambda|sigma|omega|phi"
)
_SHORT_UNIT = (
    "(?:mm|cm|dm|km|kg|mg|lbs?|oz|ft|yd|mi|in|hrs?|mins?|secs?|ms|ml|mL|mph|kph|kmh|dB|Hz|kHz|MHz|GB|MB|USD|EUR|st|nd|rd|"
    "th|m/s|cm/s|km/hr?|ft/s|mi/h)"
)
_SPACES = r"(?:\s|\\[ ,;:!]|~)+"
_NUMBER = r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_VALUE = (
    rf"(?:{_NUMBER}(?:\s*/\s*[0-9]+)?|-?(?:[0-9]+\s*)?\\[dtc]?frac\s*(?:\{{[0-9]+\}}|[0-9])\s*(?:\{{[0-9]+\}}|[0-9]))"
)
_WORD = rf"(?!(?:{_NO_UNIT})(?![A-Za-z]))[A-Za-z]"
# Without \text, letters are a unit unless they form a product: "5 dollars" and "5cm", but not "5 xy" or "2abc".
_PLAIN_UNIT = (
    rf"(?:\s*(?:(?:sq|cu)(?:\.\s*|\s+))?{_SHORT_UNIT}(?![A-Za-z])|{_SPACES}(?:of\s+(?:an?\s+|the\s+)?)?(?!(?:[a-d]+|[x-z]+)(?![a-z]))(?=[A-Za-z]*[aeiouAEIOU])"
    rf"{_WORD}[A-Za-z]{{2,}})"
)
_RAISED = r"(?:\s*\^\s*\{?-?[0-9]\}?)?"
_MORE = rf"{_RAISED}(?:(?:\.?\s+|\s*-\s*){_WORD}[A-Za-z]+{_RAISED}|\s*/\s*{_WORD}[A-Za-z]*{_RAISED})*\.?"
_TEXT_UNIT = rf"(?:{_SPACES})?\\(?:text|mathrm|mbox|textrm)\s*\{{\s*{_WORD}[A-Za-z]*{_MORE}\s*\}}{_RAISED}"
_UNIT = rf"(?:{_TEXT_UNIT}|\s+[msghlL]|{_PLAIN_UNIT}{_MORE})"
_WRAPPER = (
    r"\\(?:textbf|textit|textrm|textsf|texttt|mathbf|mathit|mathrm|mathsf|bm|boldsymbol|emph|underline|mbox|text)"
)
_SPACE = r"(?:\\[ ,;:!]|\\quad|\\qquad|~|\s)"
_LABEL = re.compile(
    rf"\s*(?:{_WRAPPER}\s*\{{\s*\(?(?P<a>[A-J])\)?[.:)]?\s*\}}{_SPACE}*|{_WRAPPER}\s*\{{\s*\((?P<b>[A-J])\)\s*(?=[^\s}}])"
    rf"|\((?P<c>[A-J])\){_SPACE}+|(?P<d>[A-J])[.:)]{_SPACE}*)(?=[^\s.}}])"
)


_LESS, _MORE_THAN = r"<=?|\\leq?(?:slant)?(?![a-z])", r">=?|\\geq?(?:slant)?(?![a-z])"
_INEQUALITY = re.compile(
    rf"[\s$]*(?:(?P<low>[^<>=A-Za-z]+?)\s*(?P<below>{_LESS})\s*)?(?P<letter>[a-z])\s*(?P<sign>{_LESS}|{_MORE_THAN})\s*"
    r"(?P<bound>[^<>=]+?)[\s$.]*"
)
_OR = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\lor(?![a-z])|\\vee(?![a-z])")


class Rule(NamedTuple):
    """A rewriting rule.

    Args:
        reason: its purpose, as listed in docs/rewards.md.
        pattern: replaced anywhere in an answer.
        by: the replacement.
    """

    reason: str
    pattern: re.Pattern[str]
    by: str | Callable[[re.Match[str]], str]


def _shifted(number: str, power: str) -> str:
    return f"{Decimal(number.replace(',', '') + 'e' + power):f}"


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} = (16 - 1) / 90."""
    whole, fixed, repeated = match["whole"] or "0", match["fixed"], match["repeated"] or match["round"]
    bottom = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    value = Fraction(int(whole + fixed + repeated) - int(whole + fixed), bottom)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _scaled(match: re.Match[str]) -> str:
    scale = match["scale"].lower()
    return f"{Decimal(_shifted(match['number'], str(_SCALES[scale]))) * (12 if scale == 'dozen' else 1):f} "


def _degrees(name: str) -> str:
    """The pattern of "60^\\circ"."""
    return rf"(?P<{name}>[0-9]+(?:\.[0-9]+)?)\s*\^\s*(?:\{{\s*\\circ\s*\}}|\\circ)"


def _union(match: re.Match[str]) -> str:
    r"""Return x < 1 or x > 3 as (-\infty, 1) \cup (3, \infty); anything else unchanged."""
    parts = [_INEQUALITY.fullmatch(part) for part in _OR.split(match[0])]
    if len(parts) < 2 or len({m and m["letter"] for m in parts}) > 1 or parts[0] is None:
        return match[0]
    return r" \cup ".join(_interval(m) for m in parts if m)


def _interval(match: re.Match[str]) -> str:
    closed = match["sign"].startswith(("\\", "=")) or match["sign"].endswith("=")
    if match["sign"].startswith((">", r"\g")):
        return rf"{'[' if closed else '('}{match['bound']}, \infty)" if not match["low"] else match[0]
    low = rf"{'(' if match['below'] == '<' else '['}{match['low']}" if match["low"] else r"(-\infty"
    return f"{low}, {match['bound']}{']' if closed else ')'}"


def _rule(reason: str, pattern: str, by: str | Callable[[re.Match[str]], str]) -> Rule:
    return Rule(reason, re.compile(pattern), by)


RULES = (
    _rule(
        "the delimiters of mathematics and of bold text",
        r"^\s*(?:\*\*|\$\$?|\\[(\[])|(?<!\\)(?:\*\*|\$\$?|\\[)\]])\s*[.,;:]?\s*$",
        "",
    ),
    _rule(
        "bold, italic and underlined",
        r"\\(?:textbf|textit|mathbf|mathit|bm|boldsymbol|emph|underline)\s*\{([^{}]*)\}",
        r"\1",
    ),
    _rule("colours", r"\\(?:text)?color\s*\{[A-Za-z]+\}\s*(?:\{([^{}]*)\}\s*$)?", r"\1"),
    _rule("numbers as text", r"^\s*\\(?:text|textrm|mathrm|mbox)\s*\{\s*(-?\\?\$?[0-9][^{}]*)\}\s*[.,;]?\s*$", r"\1"),
    _rule("inequalities joined by or", r"(?s)\A.*(?:(?<![A-Za-z\\])or(?![A-Za-z])|\\lor|\\vee).*\Z", _union),
    _rule("a leading = or + sign", r"^\s*[=+]\s*(?=\S)", ""),
    _rule(
        "dashes where only a sign can be",
        r"(?:(?<=[=<>(\[{,+*/^&])|^)(\s*)[\u2010\u2011\u2013]\s*(?=[\w\\.$(])",
        r"\1-",
    ),
    _rule("a space after a sign", r"(?:(?<=[=<>(\[{,])|^)(\s*-)(?:\s|\\[,;:! ])+(?=[\w\\.])", r"\1"),
    _rule(
        "currencies",
        r"[\u20ac\u00a3\u00a5\u20b9]|\\(?:pounds|euro|yen)(?![A-Za-z])|"
        r"(?<![A-Za-z])(?:USD|EUR|GBP|US(?=\\?\$))(?![A-Za-z])",
        "",
    ),
    _rule(
        "digits in groups",
        r"(?<![0-9.])[0-9]{1,3}(?:(?:\\,|\{,\}|,\\!\s?|\\ |~|[\u00a0\u2007\u2009\u202f])[0-9]{3})+(?![0-9])",
        lambda m: re.sub(r"[^0-9]", "", m[0]),
    ),
    _rule(
        "digits in groups, with spaces",
        r"^\s*(-?[1-9][0-9]{0,2}(?:\s[0-9]{3})+)(?=\.[0-9]|\s*[.\\]?\s*$)",
        lambda m: re.sub(r"\s", "", m[0]),
    ),
    _rule(
        "powers of ten as programs print them",
        r"(?<![\w.\\])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]([+-]?[0-9]{1,3})(?![\w.]*\w)",
        lambda m: _shifted(m[1], m[2]),
    ),
    _rule(
        "powers of ten",
        rf"(?<![\w.}}])({_NUMBER})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*"
        r"(?:\{\s*([+-]?[0-9]{1,3})\s*\}|([0-9]))(?![0-9^])",
        lambda m: _shifted(m[1], m[2] or m[3]),
    ),
    _rule("mixed numbers", r"(?<![\w./^}])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![\w/])", r"\1\\frac{\2}{\3}"),
    _rule(
        "repeating decimals",
        r"(?<![\w.])(?P<whole>[0-9]*)\.(?P<fixed>[0-9]{0,40})"
        r"(?:\\(?:overline|bar|dot)\s*\{?(?P<repeated>[0-9]{1,40})\}?|\((?P<round>[0-9]{1,40})\))",
        _repeating,
    ),
    _rule(
        "roots as characters or words",
        r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|[a-z](?![a-z])|\\pi))",
        lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}",
    ),
    _rule(
        "cube roots as characters",
        r"∛\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[a-z]))",
        lambda m: rf"\sqrt[3]{{{m[1] or m[2]}}}",
    ),
    _rule(
        "pi and infinity as words",
        r"(?<![\\A-Za-z])(pi|infinity)(?![A-Za-z])",
        lambda m: {"pi": r"\pi ", "infinity": r"\infty "}[m[1]],
    ),
    _rule("logarithms to base ten", r"\\lg(?![A-Za-z])", r"\\log_{10}"),
    _rule(
        "degrees under a sine and the like",
        rf"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{{?[0-9]\}}?)?)\s*(?:{_degrees('a')}|(?:\\left)?\(\s*{_degrees('b')}\s*(?:\\right)?\)|\{{\s*{_degrees('c')}\s*\}})",
        lambda m: rf"{m[1]}{{(\frac{{{m['a'] or m['b'] or m['c']}\pi}}{{180}})}}",
    ),
    _rule("the empty set", r"\\varnothing(?![A-Za-z])|^\s*\\\{\s*\\\}\s*$", r"\\emptyset "),
    _rule(
        "mixed numbers before a per cent sign",
        r"(?<![\w.}])([0-9]+)\s*\\[dtc]?frac\s*(?:\{([0-9]+)\}|([0-9]))\s*(?:\{([0-9]+)\}|([0-9]))(?=\s*\\%)",
        lambda m: rf"\frac{{{int(m[1]) * int(m[4] or m[5]) + int(m[2] or m[3])}}}{{{m[4] or m[5]}}}",
    ),
    _rule("per cent", r"(?<=[0-9])\s*(?:\\text\s*\{\s*)?(?:percent|per cent|pct)\.?\s*\}?(?![A-Za-z])", r"\\%"),
    _rule("temperatures", r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm)\s*\{\s*)?[CF]\s*\}?\s*$", r"^\\circ"),
    _rule(
        "large numbers in words",
        rf"(?P<number>{_NUMBER})\s*(?:\\(?:text|mathrm|mbox)\s*\{{)?\s*(?P<scale>{'|'.join(_SCALES)})(?![A-Za-z])\s*"
        r"(?:\}|(?=[^}]*$))",
        _scaled,
    ),
    _rule("units", rf"^(\s*\\?\$?\s*{_VALUE}){_UNIT}\s*$", r"\1"),
    _rule("units as text after a formula", rf"(?<=[0-9A-Za-z)}}]){_TEXT_UNIT}\s*$", ""),
    _rule("units after a root or pi", rf"(?<=[}}i])\s+{_SHORT_UNIT}{_RAISED}\s*$", ""),
    _rule("dots after a decimal", r"(?<=\.)([0-9]+)\s*(?:\.\.\.|\\l?dots|\\cdots)\s*$", r"\1"),
    _rule("punctuation at the end", r"(?:\s|\\[ ,;:!])*(?<!\.)[.,;:]?\s*$", ""),
)


def normalise(answer: str) -> str:
    r"""Rewrite an answer so that math-verify can parse it.

    Args:
        answer: LaTeX or plain, without delimiters.

    Returns:
        The same value, rewritten.

    Example:
        >>> [normalise(a) for a in (r"10\,000", "1 1/4", "\u221a2", "1.2e3", "5 dollars", r"0.1\overline{6}")]
        ['10000', '1\\frac{1}{4}', '\\sqrt{2}', '1200', '5', '\\frac{1}{6}']
    """
    answer = characters(answer).strip()
    if _PLAIN.fullmatch(answer):  # most answers; no rule applies to them
        return answer
    for rule in RULES:
        answer = rule.pattern.sub(rule.by, answer)
    return answer.strip()


_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


_RUNNING = {
    "dashes where only a sign can be",
    "digits in groups",
    "powers of ten as programs print them",
    "repeating decimals",
}
_UNIT_IN_FORMULA = re.compile(rf"{_TEXT_UNIT}(?=\s*(?:\$|\\[)\]]))")


def normalise_text(text: str) -> str:
    r"""Rewrite the formulas and numbers of running text so that math-verify can parse them.

    Example:
        >>> normalise_text(r"So it is $10\,000\text{ cm}$, or 1e2.")
        'So it is $10000$, or 100.'
    """
    text = characters(text)
    for rule in RULES:
        if rule.reason in _RUNNING:
            text = rule.pattern.sub(rule.by, text)
    return _UNIT_IN_FORMULA.sub("", text)


def characters(text: str) -> str:
    r"""Replace characters by LaTeX commands or ASCII: "\u2264" as "\le".

    Example:
        >>> characters("x \u2264 \u221e, 2\u03c0, \u22125")
        'x \\le  \\infty , 2\\pi , -5'
    """
    text = plain_characters(text)
    return text if text.isascii() else text.translate(_TRANSLATED)


_TRANSLATED = {ord(sign): command for sign, command in _SYMBOLS.items()}


def split_label(answer: str) -> tuple[str | None, str]:
    r"""Split the letter of a choice from its text.

    Args:
        answer: "C. 12", "(C) 12" or "\\textbf{(C)}\\ 12".

    Returns:
        The letter, or None, and the rest.

    Example:
        >>> split_label(r"\textbf{(B)}\ 7"), split_label("C. 12"), split_label("B+1")
        (('B', '7'), ('C', '12'), (None, 'B+1'))
    """
    match = _LABEL.match(answer)
    if match is None:
        return None, answer
    rest = answer[match.end() :]
    return match["a"] or match["b"] or match["c"] or match["d"], rest.removesuffix("}") if match["b"] else rest


def is_number(answer: str) -> bool:
    """Whether a normalised answer is one number.

    Example:
        >>> is_number("5 dollars"), is_number("x")
        (True, False)
    """
    return read_number(normalise(answer)) is not None


def is_formula(answer: str) -> bool:
    r"""Whether a normalised answer has no words except "and" and "or", so all of it is a formula.

    Example:
        >>> is_formula(r"\sqrt{2} cm"), is_formula("4, not 5")
        (True, False)
    """
    normal = re.sub(r"\b(?:and|or)\b", " ", normalise(answer))
    return bool(normal.strip()) and not re.search(r"[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", " ", normal))
