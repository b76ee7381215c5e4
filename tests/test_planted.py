"""The bugs that `make plant` plants still fit the program: each finds what it replaces."""

import os
import re
import subprocess
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest

from planted import all_replacements

TESTS = Path(__file__).parent


def test_every_replacement_finds_its_target(tmp_path: Path) -> None:
    said = tmp_path / "said"
    planter = get_context("fork").Process(target=plant_every_one, args=(said,))  # this process has imported it all
    planter.start()
    planter.join()
    assert planter.exitcode == 0, said.read_text()


def plant_every_one(said: Path) -> None:
    try:
        for record in all_replacements().values():
            record.plant()
    except BaseException:
        said.write_text(traceback.format_exc())
        raise


def named_tests() -> set[str]:
    return {test for record in all_replacements().values() for test in record.tests}


def test_every_named_test_stands_in_its_file() -> None:
    for test in named_tests():
        file, name = test.partition("[")[0].split("::")[:2]
        assert re.search(rf"^( *def|class) {name}\b", (TESTS.parent / file).read_text(), flags=re.M), test


@pytest.mark.slow
def test_every_named_case_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *sorted(named_tests())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if line.startswith("ERROR")]


@pytest.mark.parametrize("planted", [True, False])
def test_a_replacement_reaches_every_process(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}/planting:{TESTS}", prepend=os.pathsep)
    monkeypatch.delenv("DRPO_PLANTED", raising=False)
    if planted:
        monkeypatch.setenv("DRPO_PLANTED", "every seed is 7")
    child = "from drpo.seeds import derive; print(derive(1), derive(2))"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (said == "7 7\n") == planted
