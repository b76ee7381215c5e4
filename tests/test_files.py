"""Nothing is written through a link, and nothing half written is left."""

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from drpo import files
from drpo.errors import InputError
from drpo.lab.trial_result import prepare
from drpo.live.track import RUN_ID, _known_name
from drpo.train.lock import LOCK
from drpo.train.log import FILES, RunLog, write_json
from drpo.train.loop import train
from drpo.train.records import CHECKPOINTS, CONFIG, ENVIRONMENT, METRICS, MODEL, STALLED, SUMMARY, TRIALS, read_json
from drpo.train.watchdog import Watchdog
from support.hand_run import write_run
from support.hostile import refused, said
from support.sources import parsed
from support.worlds import few_run

SOURCE = Path(files.__file__).parent
SECRET = "what the user had there\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, outside the run."""
    path = tmp_path / "victim"
    path.write_text(SECRET)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


REPLACED = (CONFIG, ENVIRONMENT, SUMMARY, "config.writing", "environment.writing", "summary.writing", MODEL)
REFUSED = (*FILES, LOCK, CHECKPOINTS)


def test_a_run_replaces_the_links_in_its_folder(run: Path, victim: Path):
    for name in REPLACED:
        (run / name).symlink_to(victim)
    assert train(few_run(steps=1, eval_problems=0), run)["finished"]
    assert victim.read_text() == SECRET
    assert not [name for name in REPLACED if (run / name).is_symlink()]


@pytest.mark.parametrize(("name", "dangling"), [*((name, False) for name in REFUSED), (METRICS, True)])
def test_a_run_does_not_begin_where_what_grows_is_a_link(run: Path, victim: Path, name: str, dangling: bool):
    target = run.parent / "nothing" if dangling else victim.parent if name == CHECKPOINTS else victim
    (run / name).symlink_to(target)
    with pytest.raises(InputError, match=f"{name} is a link"):
        train(few_run(steps=1, eval_problems=0), run)
    assert victim.read_text() == SECRET and not (run.parent / "nothing").exists()


WRITERS: dict[str, Callable[[Path], object]] = {
    "a log": lambda path: RunLog(path.parent).write(METRICS, {"step": 1}),
    "a log cut": lambda path: files.truncate(path, 0),
    "the stacks": lambda path: Watchdog(path.parent, 9.0).__enter__(),
}


@pytest.mark.parametrize("what", WRITERS)
def test_what_grows_is_not_opened_through_a_link(run: Path, victim: Path, what: str):
    for name in (METRICS, STALLED):
        (run / name).symlink_to(victim)
    with pytest.raises(InputError, match="is a link"):
        WRITERS[what](run / METRICS)
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("what", WRITERS)
def test_what_grows_is_not_written_where_it_has_another_name(run: Path, victim: Path, what: str):
    for name in (METRICS, STALLED):
        os.link(victim, run / name)
    with pytest.raises(InputError, match="hard links"):
        WRITERS[what](run / METRICS)
    assert victim.read_text() == SECRET


def test_a_report_replaces_a_link(run: Path, victim: Path):
    write_run(run)
    for name in ("report.html", "report.html.writing"):
        (run / name).symlink_to(victim)
    assert said(["report", str(run)]).status == 0
    assert victim.read_text() == SECRET and not (run / "report.html").is_symlink()


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "JPG"])
def test_a_picture_replaces_a_link(run: Path, victim: Path, ending: str):
    (run / f"a.{ending}").symlink_to(victim)
    files.save_figure(Figure(), run / f"a.{ending}")
    assert victim.read_text() == SECRET and (run / f"a.{ending}").stat().st_size > 100


def test_a_name_in_a_picture_does_not_reach_the_terminal(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    figure = Figure()
    figure.suptitle("a name: \x1b[31m")
    files.save_figure(figure, tmp_path / "a.png")
    assert not recwarn.list


def test_a_trial_that_is_a_link_is_not_written_to(run: Path, victim: Path):
    (run / TRIALS).mkdir()
    (run / TRIALS / few_run().name).symlink_to(victim.parent)
    with pytest.raises(InputError, match="is a link"):
        prepare(run, [few_run()])
    assert not (victim.parent / CONFIG).exists()


def test_a_tracker_is_not_sent_what_a_link_leads_to(run: Path, victim: Path):
    (run / RUN_ID).symlink_to(victim)
    assert SECRET.strip() not in _known_name(run) and victim.read_text() == SECRET


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(run: Path, fault: BaseException):
    (run / "a").write_text("old")
    with pytest.raises(type(fault)), files.replacing(run / "a") as file:
        file.write(b"half")
        raise fault
    assert [p.name for p in run.iterdir()] == ["a"] and (run / "a").read_text() == "old"


def test_a_file_has_the_mode_that_files_have(run: Path):
    files.write_text(run / "a", "a")
    (run / "b").touch()
    assert (run / "a").stat().st_mode == (run / "b").stat().st_mode


def test_streams_of_the_kernel_are_written_to_and_pipes_refused(run: Path, capfd: pytest.CaptureFixture[str]):
    files.write_text(Path("/dev/stdout"), "said")
    assert capfd.readouterr().out == "said"
    os.mkfifo(run / "pipe.png")
    assert "pipe.png" in refused(["weights", "--out", str(run / "pipe.png")])


MAY_WRITE = {
    "files.py",
    "train/checkpoint.py",  # into a scratch folder of its own making
    "train/rollouts.py",  # the same
    "cli/output.py",  # opens what is no link, and writes nothing
    "cli/streams.py",  # to /dev/null, and to the numbers of standard streams
    "model/smollm2.py",  # into a temporary folder
    "rewards/sandboxed.py",  # to /proc
}


def test_everything_is_written_by_one_module():
    for path in sorted(SOURCE.rglob("*.py")):
        for call in (n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name not in ("write_text", "write_bytes", "savefig", "touch", "open"):
                continue
            given = ast.unparse(call)
            writes = name != "open" or any(f"'{mode}" in given for mode in ("w", "a", "x", "r+", "rb+"))
            safe = str(path.relative_to(SOURCE)) in MAY_WRITE or "opener=opened_here" in given
            assert safe or not writes or given.startswith("write_text("), f"{path}: {given}"


def test_half_a_surrogate_pair_is_written_and_read(tmp_path: Path):
    write_json(tmp_path / "a.json", {"name": "a\ud800 \u03c0"})
    assert read_json(tmp_path / "a.json") == {"name": "a\ud800 \u03c0"}
