"""Runs the notebooks of docs/notebooks and writes what their cells print and draw into them; a test checks the text.

python docs/run_notebooks.py

A small executor in the place of Jupyter's: cells share one namespace, the value of a last expression is shown, and
open figures of pyplot are drawn at a cell's end.
"""

import ast
import base64
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).with_name("notebooks")


def read(path: Path) -> dict[str, Any]:
    """Return a notebook."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def run(notebook: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Run all cells of code in order; return the outputs of each, as a notebook has them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [run_cell("".join(cell["source"]), i + 1, names) for i, cell in enumerate(cells)]


def run_cell(source: str, count: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; return its outputs: what it printed, its figures, the value of its last expression."""
    tree, printed, value = ast.parse(source), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(printed), patch.object(plt, "show", lambda: None):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(printed.getvalue())})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=72)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    if value is not None:
        shown = {"data": {"text/plain": lines(repr(value))}, "execution_count": count, "metadata": {}}
        outputs.append({**shown, "output_type": "execute_result"})
    return outputs


def lines(text: str) -> list[str]:
    """Return a text as a notebook has it: a list of lines with their ends."""
    return text.splitlines(keepends=True)


def texts(outputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what outputs say in words; of a figure that there is one."""
    return ["".join(o["text"] if o["output_type"] == "stream" else o["data"]["text/plain"]) for o in outputs]


def written(notebook: Mapping[str, Any], outputs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Return the file's text of a notebook with these outputs of its cells of code."""
    cells, left = [], iter(outputs)
    for i, cell in enumerate(notebook["cells"]):
        own = {"execution_count": None, "outputs": next(left)} if cell["cell_type"] == "code" else {}
        cells.append({"id": f"cell-{i}", **cell, **own})
    return json.dumps({**notebook, "cells": cells}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main() -> None:
    """Run every notebook, and write its outputs."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = read(path)
        path.write_text(written(notebook, run(notebook)), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
