"""Reads untrusted parquet files: a few rows at a time, of bounded size, lists of numbers as arrays."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drpo.autopsy.dumped import Column
from drpo.errors import InputError, describe

ROWS = 256
LARGEST = 2**29
"""Bytes of so many rows in memory; more is refused."""


def column_names(path: Path) -> tuple[str, ...]:
    """Return the names of a file's columns.

    Raises:
        InputError: it is no parquet file.
    """
    try:
        return tuple(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: no parquet file can be read there: {describe(error)}") from None


def numeric_columns(path: Path) -> tuple[str, ...]:
    """Return the names of the columns that hold numbers, in their order."""
    kinds = pa.types
    schema = pq.read_schema(path)
    return tuple(f.name for f in schema if kinds.is_floating(f.type) or kinds.is_integer(f.type))


def read_rows(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place of each row, for messages, and its wanted columns that the file has.

    A list of numbers becomes an array, with NaN for null; any other value becomes Arrow's Python value.

    Raises:
        InputError: it cannot be read, or its rows are too large.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            kept = [name for name in names if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=ROWS, columns=kept):
                if batch.nbytes > LARGEST:
                    raise InputError(f"{path}: rows from {number + 1} take {batch.nbytes:,} bytes; no rollouts do")
                columns = {name: _values(batch.column(name)) for name in kept}
                for i in range(batch.num_rows):
                    number += 1
                    yield f"{path} row {number}", {name: values[i] for name, values in columns.items()}
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read after row {number}: {describe(error)}") from None


def require_whole(ids: Any, where: str) -> None:
    """Raise unless a column of token ids, where there is one, holds whole numbers alone.

    Raises:
        InputError: it does not.
    """
    if ids is not None and not (isinstance(ids, np.ndarray) and ids.dtype.kind == "i"):
        raise InputError(f"{where}: token_ids must be a list of whole numbers, without nulls")


def _values(column: pa.Array) -> Sequence[Any]:
    kinds = pa.types
    if kinds.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    lists = kinds.is_list(column.type) or kinds.is_large_list(column.type)
    if not lists or not (kinds.is_floating(column.type.value_type) or kinds.is_integer(column.type.value_type)):
        values: list[Any] = column.to_pylist()
        return values
    whole = kinds.is_integer(column.type.value_type)
    inner = column.flatten().cast(pa.int64() if whole else pa.float32(), safe=whole)
    flat = np.array(inner.to_numpy(zero_copy_only=False))
    ends = np.cumsum([0 if n is None else n for n in column.value_lengths().to_pylist()])
    parts: list[Column] = np.split(flat, ends[:-1]) if len(ends) else []
    # Copies, since a view would keep all rows in memory.
    return [part.copy() if known else None for part, known in zip(parts, column.is_valid().to_pylist(), strict=True)]
