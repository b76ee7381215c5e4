"""The pages' tables of refused set-ups are what the tests refuse."""

import re
from pathlib import Path

import pytest

from adapters.pages import PAGES

TESTS = Path(__file__).parent
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
