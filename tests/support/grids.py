"""Parametrisation by few of the combinations of several parameters; the rest of them is marked slow."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch


def each_pair(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """Every two values of any two parameters meet in a case of the default suite; all other cases are slow.

    Args:
        names: of the parameters, with commas between them, as `pytest.mark.parametrize` takes them.
        values: of each parameter.
    """
    table = list(product(*map(range, map(len, values))))
    chosen = _covering(table)
    cases = [
        pytest.param(
            *(column[i] for column, i in zip(values, row, strict=True)),
            marks=() if row in chosen else pytest.mark.slow,
        )
        for row in table
    ]
    return pytest.mark.parametrize(names, cases, ids=lambda v: str(v) if isinstance(v, torch.dtype) else None)


def _covering(table: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Rows that hold every pair which a row of the table holds: each time the first one with the most new pairs."""
    pairs = {row: set(combinations(enumerate(row), 2)) for row in table}
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        best = max(table, key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
