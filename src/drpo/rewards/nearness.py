r"""Equality of values where math-verify is too lenient or too strict.

The library treats numbers as equal if they differ by less than 1e-15, or only after the sixth decimal: 1/2^99 = 1/2^98.
It treats roots as different if they differ only where they are not real: \sqrt{1/n} and 1/\sqrt{n}.
"""

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import sympy
from math_verify import grader

_DIGITS = 30
_EXACT, _ROUNDED = 1e-12, 1e-5  # relative
_COMPARED = 6  # decimals that the library compares
_POINTS = (0.37, 1.61, 2.83, -0.59, -1.43, 5.27)

_library: Callable[..., bool] = grader.sympy_numeric_eq


def narrow() -> None:
    """Replace math-verify's absolute tolerance, in this process, by a relative one.

    Exact numbers may differ by 1e-12 of the larger, decimals by 1e-5 of it.
    """
    grader.sympy_numeric_eq = _numerically_equal


def _numerically_equal(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    if _library(a, b, float_rounding, numeric_precision):
        return _near(a, b)
    x, y = grader.get_pct_val(a, a), grader.get_pct_val(b, b)  # the library compares these with integers only
    return (x is not a) != (y is not b) and _library(x, y, float_rounding, numeric_precision) and _near(x, y)


def _near(a: Any, b: Any) -> bool:
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    values = {s: sympy.Rational(7 * i + 9, 5) for i, s in enumerate(symbols)}
    tolerance = _ROUNDED if a.has(sympy.Float) or b.has(sympy.Float) else _EXACT
    pairs = [(x.xreplace(values), y.xreplace(values)) for x in _readings(a) for y in _readings(b)]
    return any(_near_numbers(x, y, tolerance) for x, y in pairs)


def _readings(value: Any) -> Iterator[Any]:
    """Yield the value and, for "9\\%", also 9: the library accepts either."""
    yield value
    if (share := grader.get_pct_val(value)) is not None:
        yield share


def _near_numbers(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, sympy.Float) and isinstance(b, sympy.Float):
        places = min(_decimals(a), _decimals(b))
        if places > _COMPARED and abs(a - b) > 0.9 * 10**-places:
            return False
    x, y = a.doit().evalf(_DIGITS), b.doit().evalf(_DIGITS)
    if not (x.is_number and y.is_number):
        return True
    return bool(sympy.Abs(x - y) <= tolerance * max(sympy.Abs(x), sympy.Abs(y)))


def _decimals(number: sympy.Float) -> int:
    """Return the number of decimals."""
    return max(0, -int(Decimal(repr(float(number))).normalize().as_tuple().exponent))


def equal_where_real(a: object, b: object) -> bool:
    r"""Whether two formulas with roots or logarithms agree wherever all their parts are real.

    Args:
        a, b: SymPy expressions with the same symbols; anything else is not equal.

    Returns:
        True if they agree at test points of both signs, at least two of which are in both domains.

    Example:
        >>> x = sympy.Symbol("x", real=True)
        >>> equal_where_real(sympy.sqrt(1 / x), 1 / sympy.sqrt(x)), equal_where_real(sympy.sqrt(x**2), x)
        (True, False)
    """
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or not a.free_symbols:
        return False
    parts = _partial(a) + _partial(b)
    if a.free_symbols != b.free_symbols or not parts or a.has(sympy.Abs) or b.has(sympy.Abs) or len(a.free_symbols) > 3:
        return False
    inside = 0
    for point in _grid(sorted(a.free_symbols, key=str)):
        if all(_real(part, point) for part in (*parts, a, b)):
            inside += 1
            if not _near_numbers(a.xreplace(point), b.xreplace(point), _EXACT):
                return False
    return inside >= 2


def _grid(symbols: list[Any]) -> Iterator[dict[Any, Any]]:
    for shift in range(len(_POINTS)):
        for sign in (1, -1):
            yield {
                s: sympy.Rational(str(_POINTS[(shift + 2 * i) % len(_POINTS)])) * (sign if i == 0 else 1)
                for i, s in enumerate(symbols)
            }


def _partial(formula: sympy.Expr) -> list[sympy.Expr]:
    """Return the parts that are not real everywhere: roots and logarithms of terms with symbols."""
    powers = [p for p in formula.atoms(sympy.Pow) if p.free_symbols and not p.exp.is_integer]
    return powers + [p for p in formula.atoms(sympy.log) if p.free_symbols]


def _real(part: Any, point: dict[Any, Any]) -> bool:
    value = part.xreplace(point).doit().evalf(_DIGITS)
    return bool(value.is_real and value.is_finite)
