"""docs/guides/what_fits.md: its sizes, its cells, and that what is said to fit does."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHAT_FITS = loaded(Path(__file__).resolve().parents[1] / "docs" / "what_fits.py")
STATED = WHAT_FITS.read_needs(WHAT_FITS.PAGE.read_text())

WEIGHTS = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen3-14B": 14_768_307_200,
}
"""As published."""


def page_of(needs: object) -> str:
    return str(WHAT_FITS.page(needs))


@pytest.mark.parametrize("way", ["QLoRA", pytest.param("8-bit, bf16", marks=pytest.mark.slow)])
def test_a_cell_is_the_estimate(way: str) -> None:
    cell = ("Qwen2.5-0.5B", "2k", way)
    assert STATED[cell] == WHAT_FITS.needed(*cell)


def test_a_way_that_saves_memory_takes_less() -> None:
    ways = list(WHAT_FITS.METHODS)
    for model in WHAT_FITS.MODELS:
        for context in WHAT_FITS.CONTEXTS:
            gib = [STATED[model, context, way] for way in ways]
            assert gib == sorted(gib, reverse=True), (model, context)
            weights = WEIGHTS[model] / 2**30
            assert gib[ways.index("full")] > 16 * weights and 2 * weights < gib[ways.index("LoRA")], (model, context)
            assert gib[ways.index("QLoRA")] > 0.5 * weights, (model, context)


@pytest.mark.slow
def test_the_page_is_that_of_its_cells_and_they_are_the_estimates() -> None:
    assert {name: WHAT_FITS.n_weights(name) for name in WEIGHTS} == WEIGHTS
    assert page_of(STATED) == WHAT_FITS.PAGE.read_text(), "python docs/what_fits.py"
    assert WHAT_FITS.all_needs() == STATED, "python docs/what_fits.py"
