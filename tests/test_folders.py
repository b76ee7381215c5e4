"""What commands write, and where: nothing into the current folder unasked, and with the modes of the umask."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from drpo import cli
from support.pictures import without_pictures

MASK = 0o027


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was made in a folder of its own under an unusual umask."""
    folder = tmp_path_factory.mktemp("made") / "run"
    size = ["--steps", "2", "--checkpoint-every", "1", "--async-steps", "1", "--sync-every", "2"]
    with umask(MASK), without_pictures():
        assert cli.main(["train", "smoke", *size, "--no-doctor", "--plain", "--out", str(folder)]) == 0
    return folder


def modes(folder: Path) -> dict[str, str]:
    """Of everything below a folder: its path and mode, where it is not that of the umask."""
    paths = [folder, *folder.rglob("*")]
    usual = {path: (0o777 if path.is_dir() else 0o666) & ~MASK for path in paths}
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    return {str(path.relative_to(folder)): oct(mode) for path, mode in found.items() if mode != usual[path]}


def test_files_and_folders_of_a_run_have_the_modes_of_the_umask(run: Path):
    assert list(run.rglob("checkpoints/*/weights.safetensors")) and list(run.rglob("model/model.safetensors"))
    assert modes(run) == {}


def test_so_have_what_export_report_and_init_write(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text("".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(600)))
    monkeypatch.setattr("drpo.cli.init.fitted", lambda run, given: run)  # which samples a hundred answers
    with umask(MASK), without_pictures():
        Path("asked").mkdir()
        assert cli.main(["export", str(run), "asked/plain"]) == 0
        assert cli.main(["report", str(run), "--out", "asked/report.html"]) == 0
        assert (
            cli.main(["init", "my.jsonl", "--model", "tiny", "--yes", "--no-doctor", "--out", "asked/recipe.py"]) == 0
        )
    assert len(list(Path("asked").iterdir())) == 3
    assert modes(Path("asked")) == {}


@pytest.mark.parametrize(
    "line",
    [
        "report RUN",
        "replay RUN",
        "weights drpo(0.2)",
        "verify RUN",
        "watch RUN --once",
        "autopsy RUN/rollouts.jsonl",
        "eval RUN --problems 2",
        "doctor smoke --quick",
        "explain entropy",
        "env",
        "recipes",
        "completion zsh",
        "train --help",
        "export RUN OUT/exported",
    ],
)
def test_a_command_writes_nothing_into_the_current_folder(
    line: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, here = tmp_path / "run", tmp_path / "here"
    shutil.copytree(run, copy)
    here.mkdir()
    monkeypatch.chdir(here)
    words = [word.replace("RUN", str(copy)).replace("OUT", str(tmp_path)) for word in line.split()]
    with without_pictures(), suppress(SystemExit):
        assert cli.main(words) == 0
    assert list(here.iterdir()) == []
