"""The bugs that `make plant` plants still fit the program: those that replace a function find it."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from planted import _records

TESTS = Path(__file__).parent


def test_names_are_unique() -> None:
    counts = Counter(r.name for r in _records("REPLACEMENTS"))
    assert [name for name, n in counts.items() if n > 1] == []


def test_every_replacement_finds_its_target() -> None:
    code = "import planted; [r.plant() for r in planted._records('REPLACEMENTS')]"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("planted", [True, False])
def test_a_replacement_reaches_every_process(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}/planting:{TESTS}", prepend=os.pathsep)
    monkeypatch.delenv("DRPO_PLANTED", raising=False)
    if planted:
        monkeypatch.setenv("DRPO_PLANTED", "drpo.seeds=every seed is 7")
    child = "from drpo.seeds import derive; print(derive(1), derive(2))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (said == "7 7\n") == planted
