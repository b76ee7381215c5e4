"""Trackers get what the run's files say, and cannot harm the run: stand-ins, and the real ones where installed.

Not covered: trackers that are on line; nothing here leaves the machine.
"""

import importlib.util
import json
import os
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo.live.track import RUN_ID, TRACKERS, Tracked, flattened
from drpo.train.callbacks import CallbackList, NullCallback
from drpo.train.config import Run, to_json
from drpo.train.loop import train
from drpo.train.records import EVALUATIONS, METRICS, ROLLOUTS, SUMMARY, TIMING, read_records
from support.forks import fork
from support.worlds import few_run

DETERMINISTIC = (METRICS, ROLLOUTS, EVALUATIONS)
Figures = list[tuple[int, Mapping[str, float]]]


class Keeper:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.figures: Figures = []
        self.opened_at: list[int] = []
        self.closed = 0

    def __call__(self, run: Run, folder: Path, step: int) -> "Keeper":
        self.opened_at.append(step)
        return self

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.figures.append((step, dict(figures)))

    def close(self) -> None:
        self.closed += 1


def small_run(**changes: Any) -> Run:
    return few_run(**({"steps": 4, "updates": 2, "eval_every": 2, "checkpoint_every": 2} | changes))


def tracked_run(folder: Path, run: Run, opener, patience_s: float = 20.0, also=None) -> list[str]:  # type: ignore[no-untyped-def]
    """Train with a tracker; return what it had said."""
    said: list[str] = []
    with Tracked("stand-in", opener, said.append, patience_s) as tracked:
        train(run, folder, CallbackList(also or NullCallback(), tracked))
    return said


def promised(folder: Path) -> dict[tuple[int, str], float]:
    """What a tracker should have, from the run's files: (step, name) -> figure."""
    found: dict[tuple[int, str], float] = {}
    for file, prefix in ((METRICS, ""), (EVALUATIONS, "evaluation/")):
        for record in read_records(folder / file):
            figures = flattened(record, prefix)
            del figures[f"{prefix}step"]
            figures = {name: value for name, value in figures.items() if "/problem_means/" not in name}
            found |= {(record["step"], name): value for name, value in figures.items()}
    for record in read_records(folder / TIMING):
        if "update" in record:  # of a step
            figures = {k: v for k, v in record.items() if k != "step"}
            found |= {(record["step"], name): v for name, v in flattened(figures, "seconds/").items()}
    summary = json.loads((folder / SUMMARY).read_text())
    totals = flattened(summary["seconds"], "seconds_in_all/")
    return found | {(summary["steps"], name): value for name, value in totals.items()}


def together(figures: Figures) -> dict[tuple[int, str], float]:
    return {(step, name): value for step, record in figures for name, value in record.items()}


# ---- what is sent ----


def test_a_tracker_gets_all_that_the_files_say(tmp_path: Path):
    keeper = Keeper()
    assert tracked_run(tmp_path, small_run(), keeper) == []
    assert together(keeper.figures) == promised(tmp_path)
    names = {name for _, name in promised(tmp_path)}
    assert {
        "reward_mean",
        "updates/1/loss",
        "evaluation/pass_at/1",
        "seconds/rollout",
        "seconds_in_all/checkpoint",
    } <= names
    assert (keeper.opened_at, keeper.closed) == ([0], 1)
    steps = [step for step, _ in keeper.figures]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 4]


class Stop(NullCallback):
    """Ends the run as a crash would, after a number of steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def stepped(self, step: int, *_: Any) -> None:
        if step == self.after:
            raise KeyboardInterrupt("a crash")  # what a callback raises besides ends no training


def test_a_run_that_resumes_goes_on_at_its_step(tmp_path: Path):
    keeper, run = Keeper(), small_run(eval_problems=0)
    with pytest.raises(KeyboardInterrupt, match="a crash"):
        tracked_run(tmp_path, run, keeper, also=Stop(after=3))
    assert keeper.closed == 1  # also then it may write what it has
    keeper.figures.clear()
    tracked_run(tmp_path, run, keeper)
    assert keeper.opened_at == [0, 3]
    assert [step for step, _ in keeper.figures] == [4, 4]


values = st.sampled_from([None, "", "12", 3, -1.5, True, float("inf"), 0])
lists = st.lists(st.one_of(values, st.lists(values, max_size=2)), max_size=3)
records = st.dictionaries(st.sampled_from("abc"), st.one_of(values, lists), max_size=3)


@given(
    record=st.dictionaries(st.sampled_from("abcd"), st.one_of(values, lists, records, st.lists(records, max_size=2)))
)
def test_flattened_has_every_number_under_its_path(record: dict[str, Any]):
    found = flattened(record)
    for path, value in found.items():
        at: Any = record
        for part in path.split("/"):
            at = at[int(part)] if isinstance(at, list) else at[part]
        assert isinstance(value, float) and value == at

    def count(x: Any) -> int:
        inner = list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else None
        return sum(map(count, inner)) if inner is not None else isinstance(x, int | float)

    assert len(found) == count(record)


# ---- trackers that fail ----


class Failing(Keeper):
    """Raises, exits or hangs at one of its methods."""

    def __init__(self, at: str, how: str, after: int = 0) -> None:
        super().__init__()
        self.at, self.how, self.after = at, how, after
        self.calls = 0
        self.let_go = threading.Event()

    def fail(self, at: str) -> None:
        if at != self.at:
            return
        self.calls += 1
        if self.calls <= self.after:
            return
        if self.how == "hang":
            self.let_go.wait(60)
        raise {"raise": RuntimeError("no network\ntoday"), "exit": SystemExit(1)}.get(self.how, KeyError())

    def __call__(self, run: Run, folder: Path, step: int) -> "Keeper":
        self.fail("open")
        return super().__call__(run, folder, step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.fail("log")
        super().log(step, figures)

    def close(self) -> None:
        self.fail("close")


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untracked")
    train(small_run(), folder)
    return folder


@pytest.mark.parametrize(
    ("at", "after", "how"),
    [
        ("log", 3, "raise"),
        ("close", 0, "exit"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("open", 0, "raise"), ("log", 3, "hang"))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("open", 0, "exit"), ("open", 0, "hang"))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("log", 3, "exit"), ("close", 0, "raise"))),
        pytest.param("close", 0, "hang", marks=pytest.mark.slow),
    ],
)
def test_a_tracker_that_fails_costs_a_line_and_not_a_bit_of_the_run(
    tmp_path: Path, untracked: Path, at: str, after: int, how: str
):
    failing = Failing(at, how, after)
    said = tracked_run(tmp_path, small_run(), failing, patience_s=0.3)
    failing.let_go.set()
    expected = {"raise": "RuntimeError: no network;", "exit": "SystemExit: 1;", "hang": "still busy after 0.3 s;"}[how]
    assert said == [f"tracker stand-in: {expected} the run goes on without it"]
    assert len(failing.figures) == (8 if at == "close" else after)
    for name in DETERMINISTIC:
        assert (tmp_path / name).read_bytes() == (untracked / name).read_bytes(), name
    assert json.loads((tmp_path / SUMMARY).read_text())["finished"]


def test_the_run_waits_for_no_tracker_while_it_goes(tmp_path: Path):
    """A tracker that stands still keeps no step waiting, and the others get theirs."""
    hanging, keeper, said, steps = Failing("log", "hang"), Keeper(), [], []

    class Watching(NullCallback):
        def stepped(self, step: int, *_: Any) -> None:
            steps.append(time.monotonic())

    with Tracked("a", hanging, said.append, 0.1) as a, Tracked("b", keeper, said.append, 20.0) as b:
        train(small_run(eval_problems=0), tmp_path, CallbackList(a, b, Watching()))
    hanging.let_go.set()
    assert len(steps) == 4 and len(said) == 1 and "tracker a" in said[0]
    assert together(keeper.figures) == promised(tmp_path)


def test_a_tracker_that_falls_far_behind_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("drpo.live.track._MOST_WAITING", 2)
    hanging = Failing("open", "hang")
    said = tracked_run(tmp_path, small_run(), hanging, patience_s=0.1)
    hanging.let_go.set()
    assert said == ["tracker stand-in: 2 steps behind; the run goes on without it"]


def test_a_tracker_of_a_run_that_never_began_does_nothing():
    keeper = Keeper()
    with Tracked("stand-in", keeper, lambda text: None):
        pass
    assert keeper.opened_at == [] and keeper.closed == 0


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb"])
def test_a_missing_package_costs_a_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    said: list[str] = []
    with Tracked(name, TRACKERS[name], said.append) as tracked:
        train(small_run(steps=1, eval_problems=0), tmp_path, tracked)
    assert len(said) == 1 and said[0].startswith(f"tracker {name}: ModuleNotFoundError: ") and module in said[0]


def test_a_hanging_tracker_does_not_keep_the_process_from_ending(tmp_path: Path):
    def never(*_: object) -> None:
        threading.Event().wait()

    def hang() -> None:
        with Tracked("x", never, print, 0.1) as tracked:
            tracked.started(Run(), Path(), 0)

    assert fork(tmp_path / "out", hang).end() == (0, "tracker x: still busy after 0.1 s; the run goes on without it\n")


# ---- the real ones ----


def installed(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed: pip install 'drpo[{name}]'")


def crash_and_resume(folder: Path, name: str) -> Run:
    """A run that is killed past its checkpoint and then finished, tracked all the while."""
    run = small_run(steps=5)
    for also in (KillIn(4), NullCallback()):  # with a checkpoint after 2 steps, so that the third is undone
        said: list[str] = []
        with suppress(KeyboardInterrupt), Tracked(name, TRACKERS[name], said.append, 240.0) as tracked:
            train(run, folder, CallbackList(tracked, also))
        assert said == []
    assert [m["step"] for m in read_records(folder / METRICS)] == [1, 2, 3, 4, 5]
    return run


class KillIn(NullCallback):
    """Ends it in the midst of a step's update, where nothing is saved: it goes on from an older checkpoint."""

    def __init__(self, step: int) -> None:
        self.left = step

    def phase(self, name: str) -> None:
        self.left -= name == "update"
        if self.left == 0:
            raise KeyboardInterrupt


def close_to(found: dict[tuple[int, str], float], wanted: dict[tuple[int, str], float], rel: float) -> None:
    assert found.keys() == wanted.keys()
    for at, value in wanted.items():
        assert found[at] == pytest.approx(value, rel=rel, abs=1e-30, nan_ok=True), at


@installed("tensorboard")
def test_tensorboard_reads_what_the_files_say(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = crash_and_resume(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    scalars = [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    # What was written past the checkpoint was taken back, so nothing is there twice.
    assert len({(step, name) for step, name, _ in scalars}) == len(scalars)
    found = {(step, name): value for step, name, value in scalars if not name.startswith("seconds_in_all")}
    wanted = {at: v for at, v in promised(tmp_path).items() if not at[1].startswith("seconds_in_all")}
    close_to(found, wanted, rel=1e-6)  # it keeps float32
    (text,) = [t.tensor_proto.string_val[0] for t in events.Tensors("config/text_summary")][-1:]
    assert json.loads(text.decode().removeprefix("```json\n").removesuffix("\n```")) == to_json(run)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after 7 bytes of header, protocol buffers inside."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@installed("wandb")
def test_wandb_keeps_what_the_files_say_and_stays_off_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    run = crash_and_resume(tmp_path, "wandb")
    sessions = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(sessions) == 2
    found: dict[tuple[int, str], float] = {}
    for record in (r for session in sessions for r in wandb_records(session)):
        if record.WhichOneof("record_type") == "run" and record.run.config.update:
            assert record.run.run_id == (tmp_path / RUN_ID).read_text().strip()  # one run, when it is sent
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert {name: config[name] for name in to_json(run)} == to_json(run)
        if record.WhichOneof("record_type") == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found |= {(int(row["step"]), name): v for name, v in row.items() if name != "step" and name[0] != "_"}
    kept = {at: value for at, value in found.items() if not at[1].startswith("seconds")}
    wanted = {at: value for at, value in promised(tmp_path).items() if not at[1].startswith("seconds")}
    close_to(kept, wanted, rel=1e-12)


@installed("trackio")
def test_trackio_stores_what_the_files_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if "trackio" in sys.modules:
        pytest.skip("trackio was imported before and stores elsewhere")
    store = tmp_path / "store"
    monkeypatch.setenv("TRACKIO_DIR", str(store))  # which it reads once, when it is imported
    folder = tmp_path / "run"
    crash_and_resume(folder, "trackio")
    with sqlite3.connect(store / "drpo.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in rows} == {(folder / RUN_ID).read_text().strip()}
    found = {(step, k): float(v) for _, step, text in rows for k, v in json.loads(text).items()}
    kept = {at: value for at, value in found.items() if not at[1].startswith("seconds_in_all")}
    close_to(kept, {a: v for a, v in promised(folder).items() if not a[1].startswith("seconds_in_all")}, rel=1e-12)
