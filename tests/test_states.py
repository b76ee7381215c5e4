"""Every state that a command can leave is one that a command goes on from, to the same bytes."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drpo import cli
from drpo.errors import InputError
from drpo.train import loop, session
from drpo.train.records import CONFIG, read_json
from support.pictures import without_pictures
from support.runs import assert_same_run, put

pytestmark = pytest.mark.usefixtures("without_pictures")

BEGIN = (
    *("train", "smoke", "--task", "support.worlds:Letters", "--steps", "2", "--prompts", "2", "--updates", "1"),
    *("--sampling.samples", "2", "--sampling.max-new-tokens", "4", "--checkpoint-every", "1", "--eval-every", "1"),
    *("--eval-problems", "1", "--no-doctor", "--stall", "0", "--plain"),
)
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.chmod")
"""What Python tells its audit hooks before it touches a file."""


class KilledError(BaseException):
    """Nothing more is written by a process that is dead."""


class Faults:
    """Lets the n-th touch of a file in a folder fail, or be the last.

    Attributes:
        count: touches so far.
    """

    def __init__(self) -> None:
        self.folder, self.count, self.at, self.dies = "", 0, 0, False
        sys.addaudithook(self._touched)  # for good: there is no taking it back

    def arm(self, folder: Path, at: int, dies: bool) -> None:
        self.folder, self.count, self.at, self.dies = str(folder), 0, at, dies

    def disarm(self) -> None:
        self.folder = ""

    def _touched(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        if not os.fspath(arguments[0]).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.at and not self.dies:
            raise OSError(errno.ENOSPC, "No space left on device", os.fspath(arguments[0]))
        if self.dies and self.count >= self.at > 0:
            raise KilledError


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    made = Faults()
    yield made
    made.disarm()


def begin(folder: Path, *more: str) -> int:
    return cli.main([*BEGIN, *more, "--out", str(folder)])


def go_on(folder: Path) -> int:
    """What a user would do: resume, or where the run has not yet written what it is, give the same command again."""
    try:
        read_json(folder / CONFIG)
    except (FileNotFoundError, InputError):
        return begin(folder)
    return cli.main(["train", "--resume", str(folder), "--trust-remote-code", "--no-doctor", "--stall", "0", "--plain"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, faults: Faults) -> tuple[Path, int]:
    """A run that nothing happens to, and how often it touches a file."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with without_pictures():
        faults.arm(folder, 0, False)
        assert begin(folder) == 0
        faults.disarm()
    return folder, faults.count


def one_fault(faults: Faults, folder: Path, at: int, dies: bool) -> None:
    faults.arm(folder, at, dies)
    try:
        status: int | None = begin(folder)
    except KilledError:
        status = None
    finally:
        faults.disarm()
    # A full disk costs status 1, unless it met something that a run does without.
    assert status is None if dies else status in (0, 1, 2), (at, status)


def assert_goes_on(whole: Path, folder: Path, again: Callable[[Path], int] = go_on) -> None:
    assert again(folder) == 0
    assert_same_run(whole, folder)
    assert not [path for path in folder.rglob("*") if ".writing" in path.name or path.name == ".lock"]


@pytest.mark.parametrize(("dies", "share"), [(True, 0.5), (False, 0.05)], ids=["killed", "disk full"])
def test_a_fault_at_a_file_is_gone_on_from(
    whole: tuple[Path, int], faults: Faults, tmp_path: Path, dies: bool, share: float
):
    one_fault(faults, tmp_path / "run", max(1, round(share * whole[1])), dies)
    assert_goes_on(whole[0], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("dies", [True, False], ids=["killed", "disk full"])
def test_a_fault_at_any_file_is_gone_on_from(whole: tuple[Path, int], faults: Faults, tmp_path: Path, dies: bool):
    assert whole[1] > 40
    for at in range(1, whole[1] + 1):
        one_fault(faults, tmp_path / f"run-{at}", at, dies)
        assert_goes_on(whole[0], tmp_path / f"run-{at}")


@pytest.mark.parametrize(
    ("owner", "name", "error", "again"),
    [
        (loop, "score", InputError("the reward has a wrong shape"), begin),
        pytest.param(
            *(session.RewardPool, "__enter__", RuntimeError("can't start new thread"), begin), marks=pytest.mark.slow
        ),
        (session, "rollout_records", KeyboardInterrupt(), go_on),
    ],
    ids=["a reward", "set-up", "a second signal"],
)
def test_a_run_that_ends_before_its_first_checkpoint_is_gone_on_from(
    whole: tuple[Path, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    error: Exception,
    again: Callable[[Path], int],
):
    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        assert begin(tmp_path / "run") != 0
    (tmp_path / "run" / "old.writing").touch()  # as if it had been killed besides
    if name == "score":
        assert begin(tmp_path / "run", "--seed", "1") == 2  # the untrained model's evaluation is another run's
    assert_goes_on(whole[0], tmp_path / "run", again)


def test_a_run_that_is_killed_behind_its_last_step_and_before_its_first_checkpoint_is_gone_on_from(
    whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def dies(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(session.Session, "_end", dies)
        begin(tmp_path, "--checkpoint-every", "0")
    assert not (tmp_path / "checkpoints").exists()
    assert go_on(tmp_path) == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        whole[0] / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("said", [None, "", '{"name": "smo'], ids=["missing", "empty", "half"])
def test_a_configuration_that_was_never_written_whole_is_written_again(
    said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    began: list[Path] = []
    monkeypatch.setattr("drpo.cli.train._run", lambda run, folder, *_: began.append(folder) or 0)
    tmp_path.joinpath(".lock").touch()
    if said is not None:
        (tmp_path / CONFIG).write_text(said)
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert begin(tmp_path) == 0 and began == [tmp_path]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # where work is, it is not taken for another run's
    assert begin(tmp_path) == 2 and "metrics.jsonl is there" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_records(whole: tuple[Path, int], tmp_path: Path):
    for name in (CONFIG, "metrics.jsonl", "rollouts.jsonl"):
        (tmp_path / name).write_bytes((whole[0] / name).read_bytes())
    config = put(read_json(tmp_path / CONFIG), {"steps": 5})
    (tmp_path / CONFIG).write_text(json.dumps(config))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert go_on(tmp_path) == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
