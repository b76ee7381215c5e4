"""The Dockerfiles, as far as can be seen without building them: their syntax, and that what they name is there.

Not covered: a build. None has been made; it needs a container engine and the images' registry.
"""

import json
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
IGNORED = (ROOT / ".dockerignore").read_text().split()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """A Dockerfile's instructions; comment lines are left out, and lines that end in a backslash joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def fault(text: str) -> str | None:
    """What is wrong with a Dockerfile, or None."""
    found, stages = instructions(text), set()
    if not found or found[0].name not in ("ARG", "FROM"):
        return "it does not begin with FROM"
    for name, rest in found:
        if name not in INSTRUCTIONS:
            return f"no instruction: {name}"
        if name == "FROM":
            image, *alias = rest.split()
            if not re.fullmatch(r"[a-z]+(/[a-z]+)?:[\w.-]+", image):
                return f"no public image with a tag: {image}"
            if alias and (len(alias) != 2 or alias[0] != "AS"):
                return f"FROM {rest}"
            stages |= set(alias[1:])
        elif name == "COPY":
            words = shlex.split(rest)
            stage = [word.partition("=")[2] for word in words if word.startswith("--from=")]
            if set(stage) - stages:
                return f"COPY from {stage}, which is no stage"
            missing = [word for word in words[:-1] if not stage and not is_in_context(word)]
            if missing:
                return f"COPY of {missing}, which the context has not"
        elif name in ("ENTRYPOINT", "CMD"):
            if not all(isinstance(word, str) for word in json.loads(rest)):
                return f"{name} {rest}"
        elif name == "ENV" and not all(re.match(r"[A-Z_]+=\S", word) for word in shlex.split(rest)):
            return f"ENV {rest}"
        elif name == "RUN":
            done = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True, check=False)
            if done.returncode:
                return done.stderr
            for extras in re.findall(r"'\.\[([\w,-]+)\]'", rest):
                if set(extras.split(",")) - EXTRAS.keys():
                    return f"no such extras: {extras}"
    return None if found[-1].name in ("CMD", "ENTRYPOINT") else "it does not end with what is run"


def is_in_context(name: str) -> bool:
    return (ROOT / name).exists() and not any(fnmatch(name, pattern) for pattern in IGNORED)


def test_there_is_one_for_a_cpu_and_one_for_cuda():
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_can_be_read_and_what_it_names_is_there(path: Path):
    text = path.read_text()
    assert fault(text) is None
    last = {name: rest for name, rest in instructions(text)}
    assert json.loads(last["ENTRYPOINT"]) == ["drpo"] and last["USER"] != "root" and last["WORKDIR"] == "/work"
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), flags=re.M)  # what it greps for
    needed = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "src", "constraints.txt"]
    assert all(is_in_context(name) for name in needed)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("FROM python:3.11-slim\n", "FORM python:3.11-slim\n"),
        ("FROM python:3.11-slim\n", "FROM python\n"),
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
        assert right in text and fault(text.replace(right, wrong)) is not None
    assert fault((ROOT / "docker/cpu.Dockerfile").read_text().replace("--from=build", "--from=built")) is not None
