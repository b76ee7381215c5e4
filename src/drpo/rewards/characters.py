"""Normalises characters: full-width digits, vulgar fractions, superscripts."""

import re
import unicodedata

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_RAISED = {ord(raised): plain for raised, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True)}
_LOWERED = {ord(lowered): plain for lowered, plain in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)}
_FRACTIONS = {c: unicodedata.normalize("NFKC", c).replace("\u2044", "/") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_LETTERS = re.compile("[\U0001d400-\U0001d7ff]")


def plain_characters(text: str) -> str:
    """Write full-width and mathematical characters, superscripts, subscripts and vulgar fractions in ASCII.

    Args:
        text: any text.

    Returns:
        The text, e.g. "1½" as "1 1/2" and "10³" as "10^{3}"; ASCII text is unchanged.

    Example:
        >>> plain_characters("\\uff15 + 1\\u00bd + 10\\u00b3")
        '5 + 1 1/2 + 10^{3}'
    """
    if text.isascii():
        return text
    text = _LETTERS.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text.translate(_WIDE))
    text = re.sub(
        f"([0-9] ?)?([{''.join(_FRACTIONS)}])", lambda m: " ".join([*(m[1] or "").split(), _FRACTIONS[m[2]]]), text
    )
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    return re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
