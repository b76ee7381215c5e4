"""Every way in which a run ends by itself is recorded with its reason, and shown where people look."""

import errno
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from drpo.errors import EngineError, InputError
from drpo.live.follow import Follower
from drpo.live.watch import draw_view
from drpo.report.run_summary import ended_early
from drpo.train import session
from drpo.train.callbacks import NullCallback
from drpo.train.ending import reason, recorded_reason
from drpo.train.loop import train
from drpo.train.records import ENVIRONMENT, METRICS, STALLED, SUMMARY
from drpo.train.verify import verify
from support.worlds import Broken, Letters, few_run


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SUMMARY).read_text())


def shown(folder: Path) -> str:
    """What `drpo watch` draws of a run."""
    console = Console(width=400, file=io.StringIO())
    console.print(draw_view(Follower(folder).look(), 400))
    return console.file.getvalue()  # type: ignore[attr-defined]


def of_summary(folder: Path) -> str:
    """What `drpo verify` says of summary.json."""
    return next(part.message for part in verify(folder) if part.name == SUMMARY)


ERRORS = (
    (EngineError("the server at http://me:secret@host:8000/v1 is gone"), "the server at http://host:8000/v1 is gone"),
    (OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"), "run/metrics.jsonl: no space left"),
    (KeyboardInterrupt(), "interrupted at once; the step that was under way is lost"),
    (MemoryError("no 2 GiB"), "out of memory (no 2 GiB)"),
    (RuntimeError("odd\x1b[31m\nforged line" + "x" * 500), "RuntimeError: odd\ufffd[31m forged linexxx"),
)
"""What is raised in a step -> how the reason begins."""


@pytest.mark.parametrize(("error", "begins"), ERRORS, ids=lambda value: type(value).__name__)
def test_what_ends_a_run_is_its_reason(
    error: BaseException, begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any) -> None:
        raise error

    monkeypatch.setattr(session, "step_metrics", raises)
    with pytest.raises(type(error)):
        train(few_run(eval_problems=0), tmp_path, keep_model=False)
    assert not summary_of(tmp_path)["finished"]
    assert_told(tmp_path, begins, "ended early")


def assert_told(folder: Path, begins: str, status: str) -> None:
    """The summary, `drpo watch`, `drpo verify` and the report say why a run ended."""
    text = summary_of(folder)["reason"]
    assert text.startswith(begins) and text.isprintable() and len(text) <= 300
    assert Follower(folder).look().status() == status and text in shown(folder)
    assert of_summary(folder).endswith(f"not finished: {text}") and ended_early(folder) == [("ended early", text)]


def test_a_reward_a_loss_and_a_signal_are_reasons(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no verdict today"):
        train(few_run(task=Letters("raising"), eval_problems=0), tmp_path / "reward", keep_model=False)
    assert_told(tmp_path / "reward", "the reward scored none of the 8 completions of a rollout", "ended early")

    with pytest.raises(FloatingPointError):
        train(few_run(objective=Broken(), max_skipped=0, eval_problems=0), tmp_path / "loss", keep_model=False)
    assert_told(tmp_path / "loss", "the gradient's norm is nan", "ended early")

    class Stops(NullCallback):
        def stepped(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    train(few_run(steps=2, eval_problems=0), tmp_path / "signal", Stops(), keep_model=False)
    assert_told(tmp_path / "signal", "stopped by SIGTERM", "stopped by signal 15")


def test_a_run_that_fails_after_its_last_step_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its last evaluation, or as it writes its model; then it goes on, and no reason is left."""
    run = few_run(steps=1)

    def raises(*_: Any, **__: Any) -> None:
        raise InputError("the judge is gone")

    for where in ("drpo.train.session.Session.evaluate_if_due", "drpo.train.run_session.write_model"):
        with monkeypatch.context() as patch:
            patch.setattr(where, raises)
            with pytest.raises(InputError, match="the judge is gone"):
                train(run, tmp_path)
        summary = summary_of(tmp_path)
        assert (summary["finished"], summary["reason"]) == (False, "the judge is gone")
    assert summary["steps"] == 1
    assert train(run, tmp_path)["finished"]
    assert summary_of(tmp_path)["reason"] is None and recorded_reason(tmp_path) is None


def test_a_start_that_fails_is_recorded_and_one_that_is_refused_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = few_run(steps=1)

    def raises(_: Any) -> None:
        raise InputError("key='JUDGE_KEY': set this environment variable")

    with monkeypatch.context() as patch:
        patch.setattr("drpo.train.session.Session._start_processes", raises)
        with pytest.raises(InputError, match="JUDGE_KEY"):
            train(run, tmp_path)
    assert_told(tmp_path, "key='JUDGE_KEY': set this", "ended early")
    train(run, tmp_path)
    before = (tmp_path / SUMMARY).read_bytes()
    with (tmp_path / METRICS).open("r+") as file:
        file.write("X")
    with pytest.raises(InputError, match="changed"):
        train(run, tmp_path)
    assert (tmp_path / SUMMARY).read_bytes() == before


def test_a_reason_is_that_of_the_last_session(tmp_path: Path) -> None:
    """Not of one before a session that goes on; and a process that hung has no summary, but its stacks."""
    for name, text in ((ENVIRONMENT, "{}"), (SUMMARY, json.dumps({"finished": False, "reason": "a\u202eb\nc"}))):
        (tmp_path / name).write_text(text)
    now = time.time()
    os.utime(tmp_path / ENVIRONMENT, (now, now - 10))
    assert recorded_reason(tmp_path) == "a\ufffdb c"
    os.utime(tmp_path / ENVIRONMENT, (now, now + 10))
    assert recorded_reason(tmp_path) is None
    (tmp_path / STALLED).write_text("update, step 3: not done in 60 s\n")
    assert recorded_reason(tmp_path) is None  # of the session before
    os.utime(tmp_path / STALLED, (now, now + 20))
    assert recorded_reason(tmp_path) == "stalled; stalled.txt has the stacks of its threads"


def test_a_reason_keeps_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRPO_SERVER_TOKEN", "s3cret")
    assert reason(EngineError("403: drpo-token: s3cret")) == "403: drpo-token: ***"
    assert reason(ValueError()) == "ValueError"
