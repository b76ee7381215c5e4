"""Reads untrusted JSON lines: one at a time, of bounded length, lists of numbers as arrays."""

from array import array
from collections import deque
from collections.abc import Iterator
from itertools import count
from os import SEEK_END
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from drpo.autopsy.dumped import Column
from drpo.errors import InputError
from drpo.train.records import parse_json

LONGEST = 2**26
"""Most bytes of a line; a longer line is refused before it is parsed."""
_SHOWN = 160

Kind = TypeVar("Kind")


class Ints(np.ndarray):
    """Type of a record's field: a list of whole numbers, read as an int64 array."""


class Floats(np.ndarray):
    """Type of a record's field: a list of numbers, read as a float32 array; null is NaN."""


def read_lines(path: Path, kind: type[Kind]) -> Iterator[tuple[str, Kind]]:
    """Yield the place of each record, for messages, and the record; a last line cut by a crash is left out.

    Args:
        path: of the file.
        kind: a msgspec structure; fields that it does not name are skipped.

    Raises:
        InputError: a line is too long, no JSON, or of other types.
    """
    decoder = msgspec.json.Decoder(kind, dec_hook=_as_array)
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(LONGEST + 1)
            if not line:
                return
            where = f"{path} line {number}"
            if len(line) > LONGEST:
                raise InputError(f"{where}: longer than {LONGEST >> 20} MiB; no rollout is")
            if line.isspace():
                continue
            try:
                yield where, decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                record = _tolerant(line, kind, where, error)
                if record is None:
                    return
                yield where, record


def _tolerant(line: bytes, kind: type[Kind], where: str, error: Exception) -> Kind | None:
    """Return a record with NaN or half a surrogate pair, as Python writes them; None for a cut line."""
    if not isinstance(error, msgspec.ValidationError):
        try:
            return msgspec.convert(parse_json(line), kind, dec_hook=_as_array)
        except msgspec.ValidationError as wrong:
            error = wrong
        except (ValueError, RecursionError) as wrong:
            if not line.endswith(b"\n"):
                return None
            error = wrong
    said = str(error).replace("`", "").replace("$.", "")
    raise InputError(f"{where}: {said if len(said) < _SHOWN else said[:_SHOWN] + '...'}") from None


def cut_line(path: Path) -> int | None:
    """Return the number of the last line of a file where a crash has cut it, so that it is not read; else None."""
    with path.open("rb") as file:
        file.seek(0, SEEK_END)
        if not file.tell():
            return None
        file.seek(-1, SEEK_END)
        if file.read(1) == b"\n":
            return None
        file.seek(0)
        ((number, last),) = deque(enumerate(file, 1), maxlen=1)
    try:
        parse_json(last)
    except (ValueError, RecursionError):
        return number
    return None


def first_keys(path: Path) -> frozenset[str] | None:
    """Return the fields of the first record of a file; None where it is empty.

    Raises:
        InputError: the first line is no JSON object.
    """
    record = next(read_lines(path, dict[str, Any]), None)
    return None if record is None else frozenset(record[1])


def _as_array(kind: type[Column], value: Any) -> Column:
    typecode, dtype = ("q", np.int64) if kind is Ints else ("f", np.float32)
    if not isinstance(value, list):
        raise ValueError(f"Expected `array`, got `{type(value).__name__}`")
    try:
        return np.frombuffer(array(typecode, value), dtype=dtype).view(kind)
    except TypeError:
        if kind is Ints or not all(x is None or isinstance(x, float | int) for x in value):
            raise ValueError("Expected numbers alone in a list of numbers") from None
        return np.array([np.nan if x is None else x for x in value], dtype=np.float32).view(kind)
    except OverflowError:
        raise ValueError("a number is too large") from None
