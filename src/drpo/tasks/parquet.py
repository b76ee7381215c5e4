"""Reads parquet files; a separate module, because pyarrow takes a third of a second to import."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        rows: list[dict[str, Any]] = _as_written(pyarrow.parquet.read_table(path)).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None
    return rows


def _as_written(table: pyarrow.Table) -> pyarrow.Table:
    """Return the table with float32 columns as float64, by their shortest decimals: 0.1, not 0.10000000149011612."""
    for i, field in enumerate(table.schema):
        if pyarrow.types.is_float32(field.type):
            decimals = table[i].cast(pyarrow.string()).cast(pyarrow.float64())
            table = table.set_column(i, field.name, decimals)
    return table
