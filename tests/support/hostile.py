"""What tests of bad input share: a command run in this process under a watch, and bad values to give it."""

import io
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from hypothesis import strategies as st

from drpo import cli
from drpo.train.config import REGISTRIES, Run, kind_of
from drpo.train.fields import FIELDS
from support.runs import put

LIMIT_S = 20
INJECTED = (
    "__import__('pathlib').Path('owned').touch()",
    "drpo(__import__('pathlib').Path('owned').touch())",
    "drpo(0.2) or open('owned', 'w')",
    "(lambda: open('owned', 'w'))()",
    "drpo(**{'delta': 0.2})",
    "drpo(*[0.2])",
    "drpo(0.2);open('owned','w')",
    "drpo(0.2, delta=0.2)",
    'f\'{open("owned", "w")}\'',
    "drpo(" + "(" * 300 + ")" * 300 + ")",
    "drpo(" + "9" * 5000 + ")",
    "drpo('\x1b[31m')",
    "no_such_module_of_ours:thing",
    "os.path:no_such_name",
    ":",
    "a:",
    ":b",
    "",
    "\0",
)
"""Specs that must be refused, and never evaluated."""


class Said(NamedTuple):
    status: int
    out: str
    err: str


@contextmanager
def limited(seconds: int = LIMIT_S) -> Iterator[None]:
    """Fail where what happens inside takes longer."""

    def ring(number: int, frame: object) -> None:
        raise AssertionError(f"hangs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said(arguments: Sequence[str]) -> Said:
    """Run a command; an exception that it lets through is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with limited(), redirect_stdout(out), redirect_stderr(err):
        status = cli.main(arguments)
    return Said(status, out.getvalue(), err.getvalue())


def refused(arguments: Sequence[str]) -> str:
    """Run a command that must be refused as bad input; return its one line."""
    status, out, err = said(arguments)
    assert status == 2, (arguments, status, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("drpo: "), (arguments, err)
    assert "Traceback" not in out and lines[0].isprintable(), (arguments, err)
    return lines[0]


def read_or_refused(arguments: Sequence[str]) -> Said:
    """Run a command that reads what may or may not be sound: it works, or says in one line why not."""
    found = said(arguments)
    assert found.status in (0, 2), (arguments, found.err)
    if found.status == 2:
        assert len(found.err.strip().splitlines()) == 1 and found.err.startswith("drpo: "), (arguments, found.err)
    assert "Traceback" not in found.out + found.err
    return found


HUGE = st.sampled_from([10**30, -(10**30), 10**400, 2**63])
NO_NUMBER = st.sampled_from([float("nan"), float("inf"), float("-inf")])
WHOLE = st.integers(-(2**62), 2**62)
NESTED = st.recursive(
    st.none() | st.booleans() | WHOLE | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CONTAINERS = NESTED.filter(lambda v: isinstance(v, list | dict))
TEXT = st.text(max_size=12)


def wrong(name: str, kind: Any) -> st.SearchStrategy[Any]:
    """Values that a field of a run must refuse."""
    if name in REGISTRIES:
        return st.booleans() | WHOLE | NO_NUMBER | CONTAINERS | st.sampled_from(INJECTED)
    if is_dataclass(kind):
        inner = st.tuples(TEXT, CONTAINERS)  # a field that there is not
        return st.none() | st.booleans() | WHOLE | st.lists(WHOLE, min_size=1) | inner.map(lambda p: dict([p]))
    if kind is str:
        return st.none() | st.booleans() | WHOLE | NO_NUMBER | CONTAINERS
    if kind is bool:
        return st.none() | WHOLE | TEXT | CONTAINERS
    return st.none() | st.booleans() | TEXT | CONTAINERS | HUGE | NO_NUMBER


OPTIONS = [(name, kind_of(path)) for name, path in FIELDS.items() if name != "learning_rate"]
GROUPS = [(f.name, f.type) for f in fields(Run) if is_dataclass(f.type)]
BAD_OPTION = st.sampled_from(OPTIONS).flatmap(lambda f: st.tuples(st.just(f[0]), wrong(*f)))
BAD_GROUP = st.sampled_from(GROUPS).flatmap(lambda f: st.tuples(st.just(f[0]), wrong("", f[1])))


@st.composite
def bad_configurations(draw: st.DrawFn, good: dict[str, Any]) -> tuple[bytes, str]:
    """The bytes of a config.json that must be refused, and what the refusal has to name."""
    kind = draw(st.sampled_from(["field", "field", "field", "group", "unknown", "shape", "cut", "bytes", "deep"]))
    whole = json.dumps(good).encode()
    if kind == "field":
        name, value = draw(BAD_OPTION)
        too_large = isinstance(value, int) and abs(value) >= 2**63  # which the parser of JSON refuses already
        return json.dumps(put(good, {name: value})).encode(), "config.json" if too_large else FIELDS[name]
    if kind == "group":
        name, value = draw(BAD_GROUP)
        return json.dumps({**good, name: value}).encode(), name
    if kind == "unknown":
        name = draw(TEXT.filter(lambda t: t not in good))
        return json.dumps({**good, name: draw(NESTED)}).encode(), "unknown field"
    if kind == "shape":
        return json.dumps(draw(NESTED.filter(lambda v: not isinstance(v, dict)))).encode(), "config.json"
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))], "config.json"
    if kind == "bytes":
        at = draw(st.integers(0, len(whole)))
        return whole[:at] + b"\xff\xfe" + whole[at:], "config.json"
    depth = draw(st.sampled_from([2_000, 100_000]))
    return draw(st.sampled_from([b"[", b'{"steps":'])) * depth, "config.json"


NAMES = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=8)
TO_FOLDERS = (
    ("train", "smoke", "--steps", "1", "--out"),
    ("compare", "smoke", "--steps", "1", "--out"),
    ("export", "tiny"),
)
TO_FILES = (
    ("report", "run", "--out"),
    ("replay", "run", "--json"),
    ("replay", "run", "--out"),
    ("weights", "--out"),
)
"""Every command that writes, up to the path."""


@st.composite
def unusable_outputs(draw: st.DrawFn, file: str, folder: str) -> tuple[str, ...]:
    """Commands that are to write where nothing can be written.

    Args:
        file: one that is there.
        folder: one that is there and not empty.
    """
    to_folder, name = draw(st.booleans()), draw(NAMES)
    command = draw(st.sampled_from(TO_FOLDERS if to_folder else TO_FILES))
    below = draw(st.sampled_from([f"{file}/", f"{file}/{name}/", "/proc/", "/sys/", "/proc/self/", "/dev/null/"]))
    own = [file] if to_folder else [f"{folder}/", f"nowhere-{name}/{name}.png", f"/proc/{name}/{name}.png"]
    pictures = [f"{name}.{name}"] if command[0] == "weights" else []
    ending = "" if to_folder else ".png"
    kinds = [*own, *pictures, *[f"{below}{name}{ending}"] * 3, name * 300 + ending, f"{name}\0{ending}"]
    return (*command, draw(st.sampled_from(kinds)))
