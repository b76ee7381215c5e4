"""Data inside a page: gzip, then base64, which no text of a completion can break out of."""

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 4
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
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":")).encode("ascii")


def columns_bytes(columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Return columns of integers as one block: its table of contents, then each column byte plane by byte plane.

        uint32 n | n bytes of JSON: [[name, dtype, length], ...], padded | the planes

    The low bytes of all numbers, then the high ones, compress better than the numbers one by one.

    Args:
        columns: name -> [N] of dtype uint8, int16 or uint32.

    Example:
        >>> block = columns_bytes({"n": np.array([1, 258], dtype=np.int16)})
        >>> block[4:24], block[-4:].hex()
        (b'[["n","int16",2]]   ', '01020001')
    """
    contents = json_bytes([[name, str(column.dtype), len(column)] for name, column in columns.items()])
    contents += b" " * (-len(contents) % _ALIGNMENT)
    planes = [_planes(column) for column in columns.values()]
    return len(contents).to_bytes(4, "little") + contents + b"".join(planes)


def _planes(column: NDArray[Any]) -> bytes:
    little = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(len(little), little.itemsize).T.tobytes()
