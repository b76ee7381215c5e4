"""The Dockerfiles, as far as can be seen without building them: their syntax, and that what they name is there.

Not covered: a build. None has been made; it needs a container engine and the images' registry.
"""

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
IGNORED = (ROOT / ".dockerignore").read_text().split()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """A Dockerfile's instructions; comment lines are left out, and lines that end in a backslash joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def of_from(rest: str, text: str) -> bool:
    """A public image's name with a tag, and nothing else but a stage's name."""
    return re.fullmatch(r"[a-z]+(/[a-z]+)?:[\w.-]+( AS \w+)?", rest) is not None


def of_copy(rest: str, text: str) -> bool:
    """Of a stage that there is, or of files that the build sees."""
    *words, _ = shlex.split(rest)
    if words[0].startswith("--from="):
        return re.search(rf"^FROM .* AS {words[0].partition('=')[2]}$", text, flags=re.M) is not None
    return all(is_in_context(word) for word in words)


def of_run(rest: str, text: str) -> bool:
    """A line that the shell can read, which installs extras that there are."""
    named = {name for extras in re.findall(r"'\.\[([\w,-]+)\]'", rest) for name in extras.split(",")}
    read = subprocess.run(["sh", "-n", "-c", rest], stderr=subprocess.DEVNULL)
    return read.returncode == 0 and named <= EXTRAS.keys()


def of_words(rest: str, text: str) -> bool:
    """A list in JSON."""
    words = json.loads(rest)
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "ARG": lambda rest, text: re.fullmatch(r'[A-Z_]+=".*"', rest) is not None,
    "CMD": of_words,
    "COPY": of_copy,
    "ENTRYPOINT": of_words,
    "ENV": lambda rest, text: all(re.match(r"[A-Z_]+=\S", word) for word in shlex.split(rest)),
    "FROM": of_from,
    "RUN": of_run,
    "USER": lambda rest, text: re.fullmatch(r"\d+:\d+", rest) is not None,
    "WORKDIR": lambda rest, text: rest.startswith("/"),
}


def faults(text: str) -> list[Instruction]:
    """The instructions that are none, or cannot be carried out."""
    return [i for i in instructions(text) if i.name not in CHECKS or not CHECKS[i.name](i.rest, text)]


def is_in_context(name: str) -> bool:
    return (ROOT / name).exists() and not any(fnmatch(name, pattern) for pattern in IGNORED)


def test_there_is_one_for_a_cpu_and_one_for_cuda():
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_can_be_read_and_what_it_names_is_there(path: Path):
    text = path.read_text()
    assert faults(text) == [] and instructions(text)[0].name == "FROM"
    last = {name: rest for name, rest in instructions(text)}
    assert json.loads(last["ENTRYPOINT"]) == ["drpo"] and last["USER"] != "root" and last["WORKDIR"] == "/work"
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), flags=re.M)  # what it greps for
    needed = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "constraints.txt"]
    assert all(is_in_context(name) for name in needed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("FROM python:3.11-slim", "FORM python:3.11-slim"),
        ("FROM python:3.11-slim", "FROM python"),
        ("COPY constraints.txt", "COPY constraint.txt"),
        ("COPY constraints.txt", "COPY runs"),
        ("[train,gym]", "[train,gim]"),
        ("&& apt-get install", "&& && apt-get install"),
        ('ENTRYPOINT ["drpo"]', "ENTRYPOINT [1]"),
    ],
)
def test_a_fault_is_seen(right: str, wrong: str):
    for path in FILES:
        text = path.read_text()
        assert right in text and faults(text.replace(right, wrong)) != []
    assert faults((ROOT / "docker/cpu.Dockerfile").read_text().replace("--from=build", "--from=built")) != []
