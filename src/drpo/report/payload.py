"""Data inside a page: gzip, then base64, which no text of a completion can break out of."""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEVEL = 6
"""Level 9 takes ten times as long on columns of tokens, and saves one per cent."""


def packed(data: bytes) -> str:
    """Return data as text for a page; the same data gives the same text.

    Example:
        >>> gzip.decompress(base64.b64decode(packed(b"</script>")))
        b'</script>'
    """
    return base64.b64encode(gzip.compress(data, compresslevel=_LEVEL, mtime=0)).decode("ascii")


def finite(value: Any) -> Any:
    """Return JSON-like data with None in place of every number that JSON does not have.

    Example:
        >>> finite({"a": [1.0, float("nan")], "b": float("inf")})
        {'a': [1.0, None], 'b': None}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(v) for v in value]
    return value


def json_bytes(value: Any) -> bytes:
    """Return JSON-like data as JSON in ASCII; half a surrogate pair in a text stays what it is."""
    dumps = partial(json.dumps, allow_nan=False, separators=(",", ":"))
    try:
        return dumps(value).encode("ascii")
    except (ValueError, TypeError):  # a number that JSON does not have, or a mapping that is no dict: it is copied
        return dumps(finite(value)).encode("ascii")


def column_bytes(column: NDArray[np.uint32]) -> bytes:
    """Return integers byte plane by byte plane: the low bytes of all, then the next ones.

    They compress better so than one by one.

    Example:
        >>> column_bytes(np.array([1, 258], dtype=np.uint32)).hex()
        '0102000100000000'
    """
    little = np.ascontiguousarray(column, dtype="<u4")
    return little.view(np.uint8).reshape(len(little), 4).T.tobytes()
