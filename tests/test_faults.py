"""Nothing that is done is lost, and nothing that was not done is claimed, whatever comes between."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo import cli
from drpo.errors import InputError
from drpo.files import write_text
from drpo.ranks import Ranks
from drpo.rollout import TransformersEngine
from drpo.train import checkpoint, session, stop, stored
from drpo.train.lock import LOCK, locked
from drpo.train.log import RunLog
from drpo.train.loop import train
from drpo.train.records import CHECKPOINTS, EVALUATIONS, METRICS, ROLLOUTS, read_records
from drpo.train.setup import build
from drpo.train.stored import fingerprint, require_sound
from support.runs import StopsAfter, assert_same_run
from support.worlds import Broken, few_run

HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from drpo.train.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(few_run(eval_every=2), folder)
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / CHECKPOINTS).glob("*"))


# Steps


def test_a_step_that_could_not_be_recorded_is_not_claimed(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counted = session.step_metrics

    def interrupted(step: int, *rest: Any) -> dict[str, Any]:
        if step == 3:
            raise KeyboardInterrupt
        return counted(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(session, "step_metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(few_run(eval_every=2, checkpoint_every=2), tmp_path)
    assert checkpoints(tmp_path) == ["step-000002"]
    assert train(few_run(eval_every=2, checkpoint_every=2), tmp_path)["finished"]
    assert_same_run(whole, tmp_path)


def test_records_that_do_not_fit_leave_the_file_as_it_was(tmp_path: Path):
    log, path = RunLog(tmp_path), tmp_path / METRICS
    log.write(METRICS, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError) as caught:
            log.write(METRICS, {"step": 2}, {"step": 2, "text": "x" * 100})
        with pytest.raises(OSError) as caught_too:
            write_text(tmp_path / "summary.json", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [caught.value.filename, caught_too.value.filename] == [str(path), str(tmp_path / "summary.json")]


def test_a_lock_that_cannot_be_removed_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(InputError, match="what ended it"), locked(tmp_path):
        raise InputError("what ended it")


def test_a_lock_that_its_holder_removes_while_it_is_taken_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken = fcntl.lockf

    def late(*arguments: Any) -> None:
        (tmp_path / LOCK).unlink()
        taken(*arguments)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(InputError, match="another process is training there"), locked(tmp_path):
        pass


def test_no_file_is_rewound_where_one_cannot_be_read(tmp_path: Path):
    log = RunLog(tmp_path)
    for file in (METRICS, ROLLOUTS):
        log.write(file, {"step": 1}, {"step": 2})
    (tmp_path / ROLLOUTS).open("a").write("null\n")
    before = (tmp_path / METRICS).read_bytes()
    with pytest.raises(InputError, match="not a record"):
        RunLog(tmp_path).rewind(1)
    assert (tmp_path / METRICS).read_bytes() == before


def test_broken_text_is_recorded(tmp_path: Path):
    RunLog(tmp_path).write(ROLLOUTS, {"step": 1, "text": "half a pair: \udcff"})
    assert read_records(tmp_path / ROLLOUTS) == [{"step": 1, "text": "half a pair: ?"}]


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.text(max_size=5)), max_size=12), step=st.integers(0, 9),
    cut=st.sampled_from(["", '{"step": 3', '{"step": 0, "text": "\u00e4']),
)  # fmt: skip
def test_a_file_is_rewound_to_a_step(
    rows: list[tuple[int, str]], step: int, cut: str, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("rewound")
    log, records = RunLog(folder), [{"step": n, "text": text} for n, text in sorted(rows)]
    log.write(ROLLOUTS, *records)
    with (folder / ROLLOUTS).open("a", encoding="utf-8") as out:
        out.write(cut)
    log.rewind(step)
    assert read_records(folder / ROLLOUTS) == [r for r in records if int(str(r["step"])) <= step]
    assert not (folder / ROLLOUTS).read_bytes() or (folder / ROLLOUTS).read_bytes().endswith(b"\n")


def test_updates_skipped_in_a_row_are_counted_across_a_stop(tmp_path: Path):
    run = few_run(objective=Broken(), updates=1, max_skipped=2)
    for last in (1, 2):
        assert train(run, tmp_path, StopsAfter(last))["steps"] == last
    with pytest.raises(FloatingPointError):
        train(run, tmp_path)
    assert [m["step"] for m in read_records(tmp_path / METRICS)] == [1, 2]


# Evaluations


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("fails", 4),
        ("is stopped", 2),
        *(pytest.param("fails", step, marks=pytest.mark.slow) for step in (0, 2)),
        *(pytest.param("is stopped", step, marks=pytest.mark.slow) for step in (0, 4)),
    ],
)
def test_an_evaluation_that_was_cut_short_is_made_up(
    how: str, where: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mark = session.score_held_out

    def cut_short(*args: Any, **named: Any) -> Any:
        done = [m["step"] for m in read_records(tmp_path / METRICS)]
        if len(done) < where:
            return mark(*args, **named)
        if how == "fails":
            raise RuntimeError("out of luck")
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on after the signal")

    with monkeypatch.context() as patch:
        patch.setattr(session, "score_held_out", cut_short)
        if how == "fails":
            with pytest.raises(RuntimeError, match="out of luck"):
                train(few_run(eval_every=2), tmp_path)
        else:
            assert train(few_run(eval_every=2), tmp_path)["stopped_by_signal"] == signal.SIGTERM
    assert checkpoints(tmp_path) == ([f"step-{where:06d}"] if where or how == "is stopped" else [])
    train(few_run(eval_every=2), tmp_path)
    assert_same_run(whole, tmp_path)


# Signals


def test_two_signals_at_once_are_one_request_and_a_later_one_is_meant(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    with stop.StopRequest(said.append) as request:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            pytest.fail("the second signal was taken for a second request")
        assert request.signal == signal.SIGINT and len(said) == 1
        monkeypatch.setattr(stop, "SAME_REQUEST_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_comes_while_the_others_are_asked_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def all_reduce_max(ranks: Ranks, value: int) -> int:
        asked.append(value)
        if len(asked) == 3:  # the first asks whether layers are computed again
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    monkeypatch.setattr(Ranks, "all_reduce_max", all_reduce_max)
    summary = train(few_run(), tmp_path)
    assert summary["stopped_by_signal"] == signal.SIGTERM and summary["steps"] == 2


# Folders and checkpoints


def test_a_folder_is_trained_in_by_one_process(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin and holder.stdout and holder.stdout.readline() == "locked\n"
    with pytest.raises(InputError, match="another process is training there"):
        train(few_run(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    holder.stdin.close()
    assert holder.wait() == 0
    assert train(few_run(), tmp_path)["finished"] and not (tmp_path / LOCK).exists()


def test_runs_that_begin_together_take_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    taken: list[Path] = []

    def begins(run: Any, ranks: Any) -> Any:
        taken.extend(Path("runs").iterdir())
        if len(taken) == 1:  # another begins before this one has written anything
            assert cli.main(["train", "smoke"]) == 2
        raise InputError("no model")

    monkeypatch.setattr("drpo.cli.train.build", begins)
    assert cli.main(["train", "smoke"]) == 2
    assert {p.name for p in taken} == {"smoke", "smoke-2"}
    assert not list(Path("runs").iterdir())  # nothing came of them


def test_a_damaged_checkpoint_is_written_anew(tmp_path: Path):
    run = few_run(steps=6, checkpoint_every=2)
    train(run, tmp_path, StopsAfter(4))
    weights = tmp_path / CHECKPOINTS / "step-000004" / stored.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(weights.parents[1] / "step-000002", weights.parents[1] / ".step-000003.writing")
    (weights.parents[1] / "step-000005").mkdir()
    (weights.parents[1] / "step-000002-of-mine").mkdir()
    watch = StopsAfter(4)
    train(run, tmp_path, watch)
    assert "step-000004" in watch.said and "going on from the one before" in watch.said
    require_sound(weights.parent)
    aside = [".step-000004.damaged", ".step-000005.damaged"]
    assert checkpoints(tmp_path) == [*aside, "step-000002", "step-000002-of-mine", "step-000004"]


def test_the_millionth_checkpoint_is_the_newest_and_links_are_dropped_as_links(tmp_path: Path):
    components, folder = build(few_run()), tmp_path / "checkpoints"
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(folder, stored.Progress(step=step), components.policy.trainable(), components.optimizer)
    elsewhere = tmp_path / "elsewhere"
    (folder / "step-999998").rename(elsewhere)
    (folder / "step-999998").symlink_to(elsewhere)
    checkpoint.prune(folder, keep=2, scores={})
    assert list(stored.steps(folder)) == [999_999, 1_000_000]
    assert stored.latest(folder) == folder / "step-1000000"
    require_sound(elsewhere)
    assert sorted(p.name for p in folder.iterdir()) == ["step-1000000", "step-999999"]


def test_a_resumed_run_does_not_map_the_files_of_its_checkpoint(tmp_path: Path):
    """They would take up the disk after they are removed, as long as the run lasts."""
    train(few_run(), tmp_path, StopsAfter(2))
    components, last = build(few_run()), tmp_path / CHECKPOINTS / "step-000002"
    checkpoint.restore(last, components.policy.checkpointed(), components.optimizer)
    assert str(last) not in Path("/proc/self/maps").read_text()


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path):
    train(few_run(), tmp_path, StopsAfter(2))
    path = tmp_path / CHECKPOINTS / "step-000002" / stored.STATE
    record = json.loads(path.read_text())
    del record["skipped"]
    old = {k: v for k, v in record.items() if k != stored.SUMS} | {"score": 0.5}
    sums = record[stored.SUMS] | {stored.STATE: fingerprint(old)}
    path.write_text(json.dumps(old | {stored.SUMS: sums}))
    require_sound(path.parent)
    assert train(few_run(), tmp_path)["finished"]


def test_an_engine_that_cannot_be_given_weights_for_an_evaluation_leaves_the_step_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load = TransformersEngine.load_weights

    def fail(engine: TransformersEngine, state: Any, version: int) -> None:
        if version == 4:
            raise RuntimeError("cannot")
        load(engine, state, version)

    monkeypatch.setattr(TransformersEngine, "load_weights", fail)
    with pytest.raises(RuntimeError, match="cannot"):
        train(few_run(), tmp_path)
    assert checkpoints(tmp_path) == ["step-000004"]
    monkeypatch.undo()
    assert train(few_run(), tmp_path)["finished"]
    assert [e["step"] for e in read_records(tmp_path / EVALUATIONS)] == [0, 4]
