"""The families of docs/models.md: one function in the trainer, transformers, the sampler and the saved folder."""

import pytest

from support.families import DOCUMENT, FAMILIES, documented, show

HANDFUL = ("deepseek_v3", "gemma4_text", "phi3, longrope", "llama4_text")
"""Buffers that are no parameters, of two kinds; a rotary embedding with a limit; one that is refused."""


def _require(family: str) -> None:
    result = show(family)
    assert result.gap < 1e-4, result
    assert result.row == documented()[family], f"PYTHONPATH=tests python -m support.families writes {DOCUMENT} anew"


@pytest.mark.parametrize("family", HANDFUL)
def test_a_handful_are_as_documented(family: str):
    _require(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in HANDFUL])
def test_every_family_is_as_documented(family: str):
    _require(family)


def test_the_table_names_every_family_and_trains_sixty():
    rows = documented()
    assert tuple(rows) == FAMILIES
    assert sum("refused" not in row for row in rows.values()) >= 60
