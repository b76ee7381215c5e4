"""Telling must never end training: output that is closed, full, gone or of few letters, and callbacks that raise."""

import errno
import io
import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest

from drpo import cli
from drpo.cli.streams import fewer_warnings, telling
from drpo.terminal import LogLines
from drpo.train import log
from drpo.train.callbacks import CallbackList, NullCallback
from drpo.train.loop import train
from support.hand_run import write_run
from support.pictures import without_pictures
from support.worlds import sampling, tiny_run


class Refusing(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = BrokenPipeError(errno.EPIPE, "Broken pipe")
LOST = OSError(errno.EIO, "Input/output error")
CLOSED = ValueError("I/O operation on closed file")


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def smoke(folder: Path, *options: str) -> int:
    """Train a step; what the pictures of it would cost is not asked here."""
    few = ("--steps", "1", "--prompts", "2", "--eval-problems", "1", "--no-doctor", "--out", str(folder))
    with without_pictures():
        return cli.main(["train", "smoke", *few, *options])


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(FULL, id="full"),
        pytest.param(CLOSED, id="closed"),
        pytest.param(GONE, id="gone", marks=pytest.mark.slow),
        pytest.param(LOST, id="terminal lost", marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_without_its_output(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Refusing(error))
    monkeypatch.setattr(sys, "stderr", err)
    assert smoke(tmp_path / "run") == 0
    assert err.getvalue().count("standard output is lost") >= 1 and "Traceback" not in err.getvalue()
    assert (tmp_path / "run" / "model").is_dir()


def test_letters_that_an_output_does_not_have_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", ascii_stream())
    assert smoke(tmp_path / "run", "--name", "π") == 0
    out.flush()
    assert b"|?-?|" in out.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("error", "status"), [(FULL, 1), (GONE, 141), (LOST, 1)], ids=["full", "gone", "lost"])
@pytest.mark.parametrize(
    "command",
    [("recipes",), ("watch", "RUN"), ("verify", "RUN"), ("--help",), ("train", "-h"), ("train", "smoke", "--help")],
    ids=" ".join,
)
def test_a_command_that_only_tells_ends_in_one_line(
    error: Exception, status: int, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_run(tmp_path)
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Refusing(error))
    monkeypatch.setattr(sys, "stderr", err)
    assert cli.main([str(tmp_path) if word == "RUN" else word for word in command]) == status
    assert err.getvalue().splitlines() == ([] if status == 141 else [f"drpo: standard output: {error.args[1]}"])


def test_an_error_that_cannot_be_told_keeps_its_status(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Refusing(FULL))
    assert cli.main(["trian"]) == 2
    before = sys.stdout, sys.stderr
    with telling(goes_on=True):
        print("π", file=sys.stderr)
    assert before == (sys.stdout, sys.stderr)


@pytest.mark.parametrize(
    "closed", ["<&- >&- 2>&-", *(pytest.param(c, marks=pytest.mark.slow) for c in ("<&-", ">&-", "2>&-"))]
)
def test_no_file_gets_the_number_of_a_stream_that_is_closed(closed: str, tmp_path: Path):
    program = "import os; from drpo.cli.streams import fewer_warnings, telling\n"
    program += "with telling(True): print(os.open('probe', os.O_CREAT | os.O_RDWR), file=open('said', 'w'))"
    command = f'"{sys.executable}" -c "{program}" {closed}'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 0 and int((tmp_path / "said").read_text()) > 2


class Raising(NullCallback):
    """Whatever it is told, it raises."""

    def __getattribute__(self, name: str) -> Any:
        def fail(*_: object) -> None:
            raise RuntimeError("no ears")

        return (
            fail
            if name in ("started", "phase", "stepped", "evaluated", "ended", "note")
            else super().__getattribute__(name)
        )


def test_a_callback_that_raises_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    heard: list[str] = []

    class Hears(NullCallback):
        def phase(self, name: str) -> None:
            heard.append(name)

    with caplog.at_level(logging.WARNING, "drpo"):
        run = tiny_run(steps=1, prompts=2, updates=1, sampling=sampling(samples=2), eval_problems=1)
        assert train(run, tmp_path, CallbackList(Raising(), Hears()))["finished"]
    assert {"rollout", "update", "evaluation"} <= set(heard)
    assert [r.getMessage() for r in caplog.records if "failed" in r.getMessage()] == [
        "Raising failed (RuntimeError: no ears); the run goes on"
    ]


def test_a_report_that_cannot_be_written_costs_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    def cannot(*_: object) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", "report.html")

    monkeypatch.setattr(logging.getLogger("drpo"), "propagate", True)
    folder = tmp_path / "run"
    monkeypatch.setattr("drpo.cli.train.write_report", cannot)
    few = ("--steps", "1", "--prompts", "2", "--eval-problems", "1", "--no-doctor", "--out", str(folder))
    assert cli.main(["train", "smoke", *few]) == 0
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["no report"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error", "metrics.jsonl"), "metrics.jsonl: Input/output error"),
        (OSError(errno.EROFS, "Read-only file system", "metrics.jsonl"), "metrics.jsonl: Read-only file system"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "metrics.jsonl"), "metrics.jsonl: no space left on the disk"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "metrics.jsonl"), "metrics.jsonl: No such file"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("can't start new thread"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ImportError("x.so: failed to map segment from shared object"), "out of memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuses(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("drpo.cli.commands.train.recipes", refuses)
    assert cli.main(["recipes"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"drpo: {said}")


@pytest.mark.parametrize(
    "removes", [pytest.param(True, id="removed"), pytest.param(False, id="read-only", marks=pytest.mark.slow)]
)
def test_a_folder_that_goes_away_is_one_line(
    removes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    opened = log.opened_here

    def refused(path: str, flags: int) -> int:
        if flags & os.O_APPEND and Path(path).name == "rollouts.jsonl":
            if removes:
                os.rename(folder, tmp_path / "elsewhere")
            raise OSError(errno.ENOENT if removes else errno.EROFS, "not here", path)
        return opened(path, flags)

    monkeypatch.setattr(log, "opened_here", refused)
    assert smoke(folder, "--plain") == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1] == f"drpo: {folder / 'rollouts.jsonl'}: not here"
    assert folder.exists() != removes  # no half of a run where it was


def test_a_name_that_no_file_can_have_is_bad_input(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["export", "x" * 300, "exported"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


ENDS_IN_PADDING, ESCAPE = re.compile(r"[ \t]$", re.MULTILINE), re.compile(r"[\x1b\r]")


@pytest.mark.parametrize(
    "arguments",
    [
        ["weights", "drpo(0.2)", "ppo(0.2,0.28)"],
        ["train", "--help"],
        ["sft", "--help"],
        ["explain", "truncation"],
        ["watch", "RUN", "--once"],
        ["autopsy", "RUN/rollouts.jsonl"],
        ["eval", "tiny", "--task", "addition(1, 9)", "--problems", "2", "--sampling.max-new-tokens", "4"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_pipe_gets_neither_padding_nor_escape_sequences(arguments: list[str], tmp_path: Path):
    write_run(tmp_path / "run")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), suppress(SystemExit):  # of --help
        assert cli.main([a.replace("RUN", str(tmp_path / "run")) for a in arguments]) == 0
    text = out.getvalue() + err.getvalue()
    assert out.getvalue() and not ENDS_IN_PADDING.search(text) and not ESCAPE.search(text)


def test_a_line_of_the_log_is_one_line_of_a_pipe():
    err = io.StringIO()
    with redirect_stderr(err):
        LogLines().emit(logging.LogRecord("drpo", logging.INFO, "", 0, "a  \x1b[31m " + "long " * 60, None, None))
    assert err.getvalue() == "a  \ufffd[31m " + "long " * 59 + "long\n"


def test_of_warnings_only_those_that_concern_the_user_are_shown(capsys: pytest.CaptureFixture[str]):
    libraries = (os.__file__, log.__file__, pytest.__file__, "/venv/lib/site-packages/torch/nn/modules/module.py")
    with fewer_warnings():
        for file in (*libraries, "/home/me/reward.py", "/venv/lib/site-packages/torch/cuda/__init__.py"):
            warnings.warn_explicit("odd\x1b", UserWarning, file, 7)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "UserWarning: odd\ufffd (/home/me/reward.py:7)"
    assert len(shown) == 2 and "torch/cuda" in shown[1]
