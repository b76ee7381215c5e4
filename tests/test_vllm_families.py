"""What vLLM makes of the folders that are saved, family by family, as docs/models.md says. Run by `make test-vllm`."""

from pathlib import Path

import pytest

from support.family_table import documented, trains
from support.family_vllm import cell, listed

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in .venv-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("family", [family for family, row in documented().items() if trains(row)])
def test_vllm_does_with_a_saved_folder_as_documented(family: str, tmp_path: Path):
    stands = documented()[family]["vLLM"]
    said, why = cell(family, tmp_path) if stands in ("loaded", "differs") else (listed(family), "its list")
    assert said == stands, why
