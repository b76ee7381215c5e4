"""The notebooks run, print what they say they print, and have the functions of the page of loops."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs" / "run_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN = runner()


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_prints_what_it_says(path: Path) -> None:
    notebook = RUN.read(path)
    said = [RUN.texts(cell["outputs"]) for cell in code_cells(notebook)]
    assert [RUN.texts(outputs) for outputs in RUN.run(notebook)] == said, "python docs/run_notebooks.py"
    assert any("<Figure>" in texts for texts in said) and sum(map(len, said)) > 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_has_the_form_of_one(path: Path) -> None:
    notebook = RUN.read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and path.stat().st_size < 100_000
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    outputs = [cell["outputs"] for cell in code_cells(notebook)]
    assert RUN.written(notebook, outputs) == path.read_text(encoding="utf-8")


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["objectives", "training_loop"]


def test_the_loop_of_the_page_is_that_of_the_notebook() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "own_loop.md").read_text(), flags=re.M | re.S)
    source = "\n\n".join(
        "".join(c["source"]) for c in code_cells(RUN.read(ROOT / "docs/notebooks/training_loop.ipynb"))
    )
    functions = re.findall(r"^(?:@[^\n]*\n)?def .*?(?=\n\n\n)", block, flags=re.M | re.S)
    assert len(functions) == 4 and all(function in source for function in functions)
    loop = block[block.index("objective, history") : block.index("\n\nprint(history")]
    assert loop in source


def test_what_a_cell_does_is_its_output() -> None:
    figure = ["import matplotlib.pyplot as plt\n", "plt.plot([a, 1])\n", "plt.show()"]
    cells: list[dict[str, Any]] = [
        {"cell_type": "code", "source": ["a = 3\n", "print(a)\n", "a + 1"]},
        {"cell_type": "markdown", "source": ["text"]},
        {"cell_type": "code", "source": figure},
    ]
    outputs = RUN.run({"cells": cells})
    assert [RUN.texts(o) for o in outputs] == [["3\n", "4"], ["<Figure>"]]
    written = json.loads(RUN.written({"cells": cells, "metadata": {}}, outputs))
    assert [len(cell.get("outputs", ())) for cell in written["cells"]] == [2, 0, 1]
    with pytest.raises(ZeroDivisionError):
        RUN.run({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]})
