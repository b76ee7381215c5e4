"""The page for people of other frameworks: their options are theirs, ours are ours, and our values can be read."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from drpo.cli.commands.train import DataOptions, ResumeOptions
from drpo.cli.options import flag, flags
from drpo.cli.template_options import PREFIX
from drpo.spec import runs_code
from drpo.train.config import REGISTRIES, read_value
from drpo.train.fields import FIELDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "coming_from.md"
NAMES = ROOT / "tests" / "option_names"
FRAMEWORKS = {"TRL": "trl", "verl": "verl", "OpenRLHF": "openrlhf", "prime-rl": "prime_rl", "Unsloth": "unsloth"}
OURS = {flag(name): name for name in FIELDS if name != "template"}
BESIDES = {*flags(DataOptions), *flags(ResumeOptions), "--resume", "--from"}
SWITCHES = {"--drop-long-prompts", "--overlap", "--whiten"}


class Row(NamedTuple):
    """Of a table: their options, ours, and the remark."""

    theirs: list[str]
    ours: list[str]
    remark: str


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def rows(framework: str) -> list[Row]:
    section = re.split(r"^## ", PAGE.read_text(), flags=re.M)
    (text,) = [s for s in section if s.startswith(f"{framework}\n")]
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert all(len(c) == 3 for c in cells), cells
    return [Row(code(theirs), code(ours), remark) for theirs, ours, remark in cells]


def known(framework: str) -> set[str]:
    lines = (NAMES / f"{FRAMEWORKS[framework]}.txt").read_text().splitlines()
    return {name for line in lines if not line.startswith("#") for name in line.split()}


def ours_unknown(commands: Sequence[str]) -> list[str]:
    """The options, or values of them, that `drpo train` does not know."""
    wrong = []
    for command in commands:
        words = shlex.split(command)
        while words:
            option = words.pop(0)
            if not option.startswith("--") or not (option in OURS or option in BESIDES or option.startswith(PREFIX)):
                wrong.append(option)
                break
            if option in SWITCHES or not words or words[0].startswith("--"):
                continue
            value, name = words.pop(0), OURS.get(option)
            if name in REGISTRIES and not runs_code(value):
                read_value(name, value)
    return wrong


@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_their_options_are_theirs_and_ours_are_ours(framework: str) -> None:
    names, table = known(framework), rows(framework)
    assert len(table) >= 10 and [r for r in table if not r.theirs] == []
    assert [name for r in table for name in r.theirs if name not in names] == []
    assert ours_unknown([command for r in table for command in r.ours]) == []


@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_options_in_remarks_are_ours_too(framework: str) -> None:
    named = [
        option for r in rows(framework) for option in code(r.remark) if option.startswith("--") and "*" not in option
    ]
    assert ours_unknown(named) == []


@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_an_option_of_theirs_has_one_row(framework: str) -> None:
    named = [name for r in rows(framework) for name in r.theirs]
    assert sorted(named) == sorted(set(named))


def test_what_a_user_of_trl_looks_for_is_one_page_from_the_start_page() -> None:
    """Ten things: the options are ours, and the page of each is linked from docs/index.md."""
    (text,) = [s for s in re.split(r"^## ", PAGE.read_text(), flags=re.M) if s.startswith("Ten things")]
    table = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    begin = set(re.findall(r"\]\(([^)#]+)", (PAGE.parent / "index.md").read_text()))
    assert len(table) == 10
    for theirs, ours, pages in table:
        commands = [command[command.index("--") :] for command in code(ours) if "--" in command]
        assert (commands or "drpo explain" in ours) and ours_unknown(commands) == [], ours
        linked = re.findall(r"\]\(([^)#]*)", pages)
        assert linked and set(linked) <= {*begin, ""}, (theirs, linked)


def test_the_lists_say_of_which_version_they_are() -> None:
    for name in FRAMEWORKS.values():
        first = (NAMES / f"{name}.txt").read_text().splitlines()[0]
        assert re.match(r"# \S+ \d+\.\d+", first), first


def test_what_is_wrong_is_noticed() -> None:
    assert ours_unknown(["--sampels 3"]) == ["--sampels"]
    with pytest.raises(ValueError, match="did you mean 'zscore'"):
        ours_unknown(["--advantage zscroe"])
    assert "num_generation" not in known("TRL") and "num_generations" in known("TRL")
