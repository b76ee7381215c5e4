"""Numbers as the page shows them: three significant digits, each in 16 bits, so that what is stored is what is seen."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Codes = NDArray[np.int16]

MISSING = -32768
"""The code of a number that there is not (NaN)."""
SMALLEST = -20
"""Decimal exponent of the smallest magnitude with digits of its own; smaller ones have the code +-1."""
N_DECADES = 36
PER_DECADE = 900
TOO_LARGE = 2 + N_DECADES * PER_DECADE
"""The code of magnitudes from 10^16 on, up to the sign."""


def encode(values: Floats) -> Codes:
    """Round to three significant digits and number the decimals in their order.

        code(0) = 0;   code(+-d.dd * 10^e) = +-(2 + 900 (e + 20) + ddd - 100)

    Codes are ordered as the numbers are, and neighbours differ by 1, so the difference of the codes of two near numbers
    is small: what is left of one when the other is known.

    Args:
        values: [N]; NaN is `MISSING`.

    Returns:
        [N] int16.

    Example:
        >>> encode(np.array([0.0, 1e-30, 0.123456, -0.123456, 0.9999, np.nan])).tolist()
        [0, 1, 17125, -17125, 18002, -32768]
    """
    wide = np.asarray(values, dtype=np.float64)
    size = np.abs(np.nan_to_num(wide, nan=0.0))
    known = (size >= 10.0**SMALLEST) & np.isfinite(size)
    safe = np.where(known, size, 1.0)
    exponent = np.floor(np.log10(safe)).astype(np.int64)
    # The logarithm may be off by a rounding next to a power of ten; the digits then say so.
    digits = np.rint(safe / 10.0 ** (exponent - 2)).astype(np.int64)
    exponent, digits = exponent - (digits < 100), np.where(digits < 100, digits * 10, digits)
    exponent, digits = exponent + (digits >= 1000), np.where(digits >= 1000, 100, digits)
    code = 2 + (exponent - SMALLEST) * PER_DECADE + digits - 100
    code = np.where(known, np.minimum(code, TOO_LARGE), np.where(size == 0, 0, np.where(size < 1, 1, TOO_LARGE)))
    signed = np.where(np.isnan(wide), MISSING, np.sign(np.nan_to_num(wide)).astype(np.int64) * code)
    return signed.astype(np.int16)


def decode(codes: Codes) -> NDArray[np.float64]:
    """Return the decimals that codes stand for, [N]; 1e-20 and 1e16 where a magnitude lies beyond.

    Example:
        >>> decode(encode(np.array([0.0, 0.123456, -2.0, np.nan]))).tolist()
        [0.0, 0.123, -2.0, nan]
    """
    size = np.abs(codes.astype(np.int64))
    exponent, digits = np.divmod(np.maximum(size - 2, 0), PER_DECADE)
    # Through text, because only that gives the double nearest to the decimal.
    found = np.char.add((digits + 100).astype(str), np.char.add("e", (exponent + SMALLEST - 2).astype(str)))
    value = np.where(size == 0, 0.0, found.astype(np.float64))
    return np.where(codes == MISSING, np.nan, np.sign(codes) * value)
