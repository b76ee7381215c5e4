"""The pages' tables of refused set-ups are what the tests refuse; every test that needs a framework has a target."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from adapters.cases import UNSERVED_2026
from adapters.pages import PAGES
from drpo.adapters import objective_of
from drpo.errors import InputError

TESTS = Path(__file__).parent
ADAPTERS = TESTS.parents[1] / "src" / "drpo" / "adapters"
TABLED = ("areal", "open_instruct", "roll", "swift", "torchtitan", "unsloth")


@pytest.mark.parametrize("name", TABLED)
def test_every_set_up_that_a_page_calls_refused_is_refused_in_its_tests(name: str):
    table = (PAGES / f"{name}.md").read_text().split("## Refused set-ups")[1].split("\n## ")[0]
    set_ups = re.findall(r"^\| (?!set-up)(.+?) \|", table, flags=re.M)
    tests = (TESTS / f"test_{name}.py").read_text()
    named = [span for set_up in set_ups for span in re.findall(r"`(.+?)`", set_up)]
    fields = {re.split(r"[= ]", span.removeprefix("--"))[0].rpartition(".")[2] for span in named}
    assert len(set_ups) >= 4 and len(fields) >= 4
    assert not [field for field in fields if field not in tests]


def test_every_module_that_needs_a_framework_is_run_by_a_target():
    makefile = (TESTS.parents[1] / "Makefile").read_text()
    patterns = re.findall(r"tests/adapters/(test_[\w*]+\.py)", makefile)
    needy = [file.name for file in TESTS.glob("test_*.py") if "\npytestmark = pytest.mark.adapters" in file.read_text()]
    assert len(needy) >= 10
    assert not [name for name in needy if not any(fnmatch(name, pattern) for pattern in patterns)]


def test_every_adapter_refuses_what_none_can_serve():
    """Each builds its objective by `objective_of`, which refuses statistics of the batch, rewards and models."""
    for spec in UNSERVED_2026:
        with pytest.raises(InputError, match=r"^objective=.* reads ") as refused:
            objective_of(spec, "objective")
        assert "\n" not in str(refused.value)
    adapters = [file for file in ADAPTERS.rglob("*.py") if "from drpo.adapters.weighing import" in file.read_text()]
    shared = {"__init__.py", "record.py", "grpo.py"}
    found = {file.parent.name if file.name == "__init__.py" else file.stem: file.read_text() for file in adapters
             if file.parent != ADAPTERS or file.name not in shared}  # fmt: skip
    assert len(found) >= 14 and not [name for name, text in found.items() if "objective_of(" not in text]
