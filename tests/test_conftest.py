"""Property tests of `make test` draw the same cases whatever ran before them, and no test module imports another."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sources import parsed


def drawn() -> list[str]:
    cases = []

    @settings(settings.get_profile("default"), max_examples=100)
    @given(st.tuples(st.integers(), st.floats(), st.text()))
    def look(case: tuple[int, float, str]) -> None:
        cases.append(repr(case))

    look()
    return cases


def test_cases_do_not_depend_on_the_modules_that_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = drawn()
    (tmp_path / "full_of_constants.py").write_text(f"X = {[*range(71_000, 71_040)]}\nY = {[i / 7 for i in range(40)]}")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("full_of_constants")
    assert drawn() == before


def test_no_test_module_imports_another() -> None:
    tests, may_import = Path(__file__).parent, re.compile(r"^\s*(from|import)\b.*\btest_", flags=re.M)
    imported = {
        (path.name, name)
        for path in tests.rglob("test_*.py")
        if may_import.search(path.read_text(encoding="utf-8"))
        for node in ast.walk(parsed(path))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)])
        if name and name.rpartition(".")[2].startswith("test_")
    }
    assert imported == set()
