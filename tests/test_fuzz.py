"""Bad input of every kind, made up by hypothesis: one line that names it, status 2, no traceback, no hang, no code run.

As many examples as `EXAMPLES` says; thirty times as many, and others, in the slow form.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo.cli import COMMANDS
from drpo.cli.runs import reading
from drpo.errors import InputError
from drpo.lab.replay import recorded
from drpo.live.follow import Follower
from drpo.live.watch import draw_view
from drpo.recipes.addition import smoke
from drpo.report.run_page import browser_payloads
from drpo.report.token_statistics import read_rollouts
from drpo.report.vocabulary import find_tokenizer
from drpo.train import loop
from drpo.train.config import configure
from drpo.train.records import CHECKPOINTS, CONFIG, MODEL
from support.hand_run import conversation, write_lines, write_run
from support.hostile import (
    CONTAINERS,
    INJECTED,
    NESTED,
    TEXT,
    bad_configurations,
    limited,
    read_or_refused,
    refused,
    unusable_outputs,
)

EXAMPLES = {
    "configuration": 30,
    "command": 20,
    "data": 6,
    "records": 5,
    "conversation": 12,
    "checkpoint": 8,
    "model": 2,
    "output": 10,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with a checkpoint and a model; nothing here changes it."""
    folder = tmp_path_factory.mktemp("made") / "run"
    loop.train(configure(smoke(), steps=2, eval_problems=2), folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def run(made: Path, here: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(made, here / "run")
    return here / "run"


def fuzz(kind: str, scale: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run a check on as many examples as there should be of a kind."""

    @settings(max_examples=EXAMPLES[kind] * scale, deadline=None)
    @given(strategy)
    def each(case: Any) -> None:
        check(case)

    each()
    assert not Path("owned").exists(), "a spec was evaluated"


READERS = (
    ("train", "--resume", "run", "--no-doctor"),
    ("report", "run"),
    ("eval", "run"),
    ("export", "run", "exported"),
)
"""Commands that read the whole configuration of a run."""

SCALES = pytest.mark.parametrize("scale", [1, pytest.param(30, marks=pytest.mark.slow)])


@SCALES
def test_configurations(run: Path, scale: int):
    good = json.loads((run / CONFIG).read_text())

    def check(case: tuple[tuple[bytes, str], tuple[str, ...]]) -> None:
        (data, named), command = case
        (run / CONFIG).write_bytes(data)
        if command[0] != "train":  # the others leave code alone that fields name which they do not need
            shutil.rmtree("exported", ignore_errors=True)
            read_or_refused(command)
        else:
            assert named in refused(command)

    fuzz("configuration", scale, st.tuples(bad_configurations(good), st.sampled_from(READERS)), check)


NUMBERS = ("--steps", "--prompts", "--updates", "--seed", "--async-steps", "--sampling.samples", "--learning-rate")
SPECS = ("--objective", "--task", "--reward", "--advantage", "--reduction", "--eval-task")
WORDS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=8)
NOT_NUMBERS = WORDS.filter(lambda w: w not in ("nan", "inf", "infinity")) | st.sampled_from(["1e9x", "--", "1,2", "½"])
PLACES = {
    "train": ("smoke",),
    "doctor": ("smoke",),
    "compare": ("smoke",),
    "eval": ("tiny",),
    "export": ("tiny", "exported"),
    "watch": ("run",),
    "report": ("run",),
    "replay": ("run",),
    "chat": ("tiny",),
    "serve-rollouts": ("tiny",),
}


@st.composite
def bad_commands(draw: st.DrawFn) -> list[str]:
    """Command lines that must be refused."""
    kinds = ["command", "option", "number", "spec", "spec", "weights", "surplus", "nowhere"]
    kind = draw(st.sampled_from(kinds))
    name = draw(st.sampled_from(sorted(COMMANDS)))
    if kind == "command":
        return [draw(TEXT.filter(lambda t: t not in COMMANDS and t not in ("", "-h", "--help", "help", "--version")))]
    if kind == "option":
        return [name, *PLACES.get(name, ()), f"--zz{draw(WORDS)}", draw(TEXT)]
    if kind == "number":
        of = draw(st.sampled_from(["train", "doctor"]))
        return [of, "smoke", draw(st.sampled_from(NUMBERS)), draw(NOT_NUMBERS)]
    if kind == "spec":
        of = draw(st.sampled_from(["train", "doctor"]))
        spec = draw(st.sampled_from(INJECTED) | CONTAINERS.map(repr))
        return [of, "smoke", f"{draw(st.sampled_from(SPECS))}={spec}"]
    if kind == "weights":
        return ["weights", f"{draw(WORDS)}({draw(TEXT)}"]
    if kind == "surplus":
        return [name, *PLACES.get(name, ()), f"-{draw(WORDS.filter(lambda w: 'h' not in w))}"]
    of = draw(st.sampled_from(["train --resume", "watch", "report", "replay", "compare --resume", "eval"]))
    return [*of.split(), f"nowhere/{draw(WORDS)}"]


@SCALES
def test_command_lines(run: Path, scale: int):
    fuzz("command", scale, bad_commands(), lambda case: refused(case))


ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(8)]


@st.composite
def bad_data(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name of a data file and its bytes, which no task can be made of."""
    lines = [json.dumps(row) for row in ROWS]
    whole = "\n".join(lines).encode()
    kind = draw(st.sampled_from(["cut", "columns", "bytes", "empty", "huge", "rows", "parquet", "value", "deep"]))
    if kind == "cut":
        at = draw(st.integers(1, len(lines[0]) - 1))
        return "data.jsonl", whole + b"\n" + lines[0][:at].encode()
    if kind == "columns":
        return "data.jsonl", json.dumps({draw(WORDS.filter(lambda w: w != "question")): "x", "answer": "1"}).encode()
    if kind == "bytes":
        at = draw(st.integers(0, len(whole)))
        return "data.jsonl", whole[:at] + draw(st.sampled_from([b"\xff", b"\xc3\x28", b"\x80abc"])) + whole[at:]
    if kind == "empty":
        name = draw(st.sampled_from(["data.jsonl", "data.json", "data.parquet"]))
        return name, draw(st.sampled_from([b"", b"\n \n"]))
    if kind == "huge":
        return "data.jsonl", b'{"question": "' + b"a" * draw(st.sampled_from([10**5, 4 * 10**6]))
    if kind == "rows":
        return "data.jsonl", whole + b"\n" + json.dumps(draw(NESTED.filter(lambda v: not isinstance(v, dict)))).encode()
    if kind == "parquet":
        inside = draw(st.binary(max_size=64))
        return "data.parquet", draw(st.sampled_from([inside, b"PAR1" + inside + b"PAR1"]))
    if kind == "value":
        return "data.jsonl", whole + b"\n" + json.dumps({"question": draw(CONTAINERS), "answer": "1"}).encode()
    return draw(st.sampled_from(["data.jsonl", "data.json"])), b"[" * 100_000


@SCALES
def test_data_files(here: Path, scale: int):
    def check(case: tuple[str, bytes]) -> None:
        name, data = case
        (here / name).write_bytes(data)
        task = f"records({name!r}, prompt='question', answer='answer', reward_name='exact_number')"
        assert name in refused(["train", "smoke", "--no-doctor", "--out", "new", "--task", task])

    fuzz("data", scale, bad_data(), check)


LOGS = ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl", "rollouts.jsonl", "environment.json", "summary.json")


@st.composite
def damaged(draw: st.DrawFn, folder: Path, names: tuple[str, ...]) -> tuple[str, bytes]:
    """A file of a folder as JSON, with a value replaced, a line cut short, or bytes that are no text."""
    name = draw(st.sampled_from(names))
    lines = (folder / name).read_bytes().splitlines() if name.endswith("l") else [(folder / name).read_bytes()]
    at = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(["value", "value", "value", "cut", "bytes", "shape"]))
    if kind == "value":
        record = json.loads(lines[at])
        record[draw(st.sampled_from(sorted(record)))] = draw(NESTED | st.sampled_from([1e999, 10**400, float("nan")]))
        lines[at] = json.dumps(record).encode()
    elif kind == "cut":
        lines[at] = lines[at][: draw(st.integers(0, len(lines[at]) - 1))]
    elif kind == "bytes":
        lines[at] = lines[at][:5] + b"\xff" + lines[at][5:]
    else:
        lines[at] = json.dumps(draw(NESTED)).encode()
    return name, b"\n".join(lines) + b"\n"


@SCALES
def test_records_of_a_run(run: Path, scale: int):
    commands = st.sampled_from([("report", "run"), ("watch", "run", "--once"), ("replay", "run")])

    def check(case: tuple[tuple[str, bytes], tuple[str, ...]]) -> None:
        (name, data), command = case
        whole = (run / name).read_bytes()
        (run / name).write_bytes(data)
        try:
            read_or_refused(command)
        finally:
            (run / name).write_bytes(whole)

    fuzz("records", scale, st.tuples(damaged(run, LOGS), commands), check)


@st.composite
def damaged_conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A record of an episode of several turns, with a value replaced somewhere in it."""
    record = conversation()
    parts = [
        record,
        record["played"],
        record["branches"][0],
        *record["messages"],
        record["messages"][4]["tool_calls"][0],
    ]
    part = draw(st.sampled_from(parts))
    part[draw(st.sampled_from(sorted(part)))] = draw(NESTED | st.sampled_from([float("nan"), [[0, 2**62]], [2**62]]))
    return record


@SCALES
def test_records_of_conversations(here: Path, scale: int):
    run = write_run(here / "run")
    readers: list[Callable[[], Any]] = [
        lambda: browser_payloads(
            read_rollouts(here / "run", run.objective.loss, 10**6), find_tokenizer(here / "run", run)
        ),
        lambda: recorded(here / "run"),
        lambda: draw_view(Follower(here / "run").look(), 80),
    ]

    def check(record: dict[str, Any]) -> None:
        write_lines(here / "run" / "rollouts.jsonl", [record])
        for reader in readers:
            with limited(), suppress(InputError), reading(here / "run"):
                reader()

    fuzz("conversation", scale, damaged_conversations(), check)


@st.composite
def damage(draw: st.DrawFn, folder: Path) -> tuple[Path, bytes]:
    """A file of a folder and other bytes for it: cut short, with a piece overwritten, or nothing like it."""
    name = draw(st.sampled_from(sorted(p.name for p in folder.iterdir() if p.is_file())))
    whole = (folder / name).read_bytes()
    kind = draw(st.sampled_from(["cut", "head", "other"]))
    if kind == "cut":
        return folder / name, whole[: draw(st.integers(0, len(whole) // 2))]
    if kind == "head":  # of a safetensors file: the length of its header; of JSON: what opens it
        return folder / name, draw(st.binary(min_size=8, max_size=8)) + whole[8:]
    return folder / name, draw(st.binary(max_size=32)) + b"\x00\xff"


@SCALES
def test_checkpoints(run: Path, scale: int):
    (checkpoint,) = (run / CHECKPOINTS).glob("step-*")
    shutil.rmtree(run / MODEL)

    def check(case: tuple[tuple[Path, bytes], tuple[str, ...]]) -> None:
        (path, data), command = case
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            assert checkpoint.name in refused(command)
        finally:
            path.write_bytes(whole)

    commands = st.sampled_from([("train", "--resume", "run", "--no-doctor"), ("export", "run", "exported")])
    fuzz("checkpoint", scale, st.tuples(damage(checkpoint), commands), check)


@SCALES
def test_models(run: Path, scale: int):
    def check(case: tuple[Path, bytes]) -> None:
        path, data = case
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            found = read_or_refused(["eval", "run/model", "--task", "addition(1, 9)", "--problems", "1"])
            assert found.status == 2 or path.name not in ("model.safetensors", "config.json", "tokenizer.json")
        finally:
            path.write_bytes(whole)

    fuzz("model", scale, damage(run / MODEL), check)


@SCALES
def test_unusable_outputs(run: Path, here: Path, scale: int):
    (here / "file").write_text("kept")
    before = sorted(here.rglob("*"))

    def check(command: tuple[str, ...]) -> None:
        line = refused(command)
        option = command[-2] if command[-2].startswith("--") else command[0]
        assert line.startswith(f"drpo: {option}") and ";" in line, line
        assert sorted(here.rglob("*")) == before and (here / "file").read_text() == "kept"

    fuzz("output", scale, unusable_outputs("file", "run"), check)
