"""A run that comes to a standstill ends itself, says where, and is resumed as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drpo import cli
from drpo.train.loop import train
from drpo.train.records import CHECKPOINTS, STALLED
from drpo.train.stored import latest
from drpo.train.watchdog import STATUS, Watchdog
from support.runs import assert_same_run
from support.worlds import few_run

ROOT = Path(__file__).resolve().parents[1]
BREAKS = """
import subprocess, sys, time
from pathlib import Path
from drpo import cli
from drpo.errors import EngineError
from drpo.rollout import TransformersEngine
from drpo.train.loop import train
from drpo.train.watchdog import Watchdog
from support.worlds import few_run

how, folder, draw = sys.argv[1], Path(sys.argv[2]), TransformersEngine.generate

def generate(engine, requests):
    if requests[0].key[1] == 2:
        if "again" in how:
            subprocess.Popen(["sleep", "1000"])  # of the engine; whoever reads our output would wait for it
        if "dies" in how:
            raise EngineError("engine: it is dead")
        time.sleep(1000)
    return draw(engine, requests)

TransformersEngine.generate = generate
"""
ENDS = """
with Watchdog(folder, 4.0) as watchdog:
    train(few_run(checkpoint_every=1), folder, watchdog)
"""
RESTARTS = """
sys.exit(cli.main(["train", "smoke", "--out", str(folder), "--checkpoint-every", "1", *sys.argv[3:]]))
"""


def broken(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", BREAKS + script, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.slow
def test_a_sampler_that_hangs_ends_the_process_with_its_stacks_and_the_step_is_done_again(tmp_path: Path):
    done = broken(ENDS, "hangs", str(tmp_path / "run"))
    assert done.returncode == STATUS, done.stderr
    assert "drpo: rollout, step 3: not done in 4 s" in done.stderr and "--resume" in done.stderr
    stacks = (tmp_path / "run" / STALLED).read_text()
    assert "rollout, step 3" in stacks and "in generate" in stacks
    train(few_run(checkpoint_every=1), tmp_path / "run")
    train(few_run(checkpoint_every=1), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs, again", "dies, again"])
def test_a_run_begins_again_in_the_place_of_its_process(how: str, tmp_path: Path):
    flags = ["--stall", "6", "--plain", "--no-doctor"]
    done = broken(RESTARTS, how, str(tmp_path / "run"), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("beginning again from the last checkpoint") == 1
    stacks = tmp_path / "run" / STALLED
    assert ("in generate" in stacks.read_text()) if "hangs" in how else not stacks.exists()
    assert cli.main(["train", "smoke", "--out", str(tmp_path / "whole"), "--checkpoint-every", "1", "--no-doctor"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_may_not_begin_again_says_how_to_go_on(tmp_path: Path):
    done = broken(RESTARTS, "dies", str(tmp_path / "run"), "--restarts", "0", "--no-doctor")
    assert done.returncode == STATUS and "\ndrpo: engine: it is dead; `drpo train --resume" in f"\n{done.stderr}", (
        done.stderr
    )
    assert latest(tmp_path / "run" / CHECKPOINTS) is not None


@pytest.mark.parametrize("seconds", [600.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_is_left_alone(seconds: float, tmp_path: Path):
    with Watchdog(tmp_path, seconds) as watchdog:
        summary = train(few_run(), tmp_path, watchdog)
    assert summary["finished"] and not (tmp_path / STALLED).exists()


def test_where_no_thread_is_to_be_had_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fails)
    with pytest.raises(RuntimeError, match="thread"), Watchdog(tmp_path, 60.0):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [False, True])
def test_a_run_that_ends_before_it_begins_leaves_the_file_only_where_it_found_it(tmp_path: Path, found: bool):
    if found:
        (tmp_path / STALLED).touch()  # of the process that is at this run
    with pytest.raises(OSError, match="full"), Watchdog(tmp_path, 60.0):
        raise OSError("full")
    assert (tmp_path / STALLED).exists() == found
