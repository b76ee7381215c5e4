"""A run that comes to a standstill ends itself, says where, and is resumed as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drpo.train.loop import train
from drpo.train.watchdog import STALLED, STATUS, Watchdog
from test_train import assert_same_run
from worlds import tiny_run

ROOT = Path(__file__).resolve().parents[1]
HANGS = """
import sys, time
from pathlib import Path
from drpo.rollout import TransformersEngine
from drpo.train.loop import train
from drpo.train.watchdog import Watchdog
from worlds import tiny_run

draw, folder = TransformersEngine.generate, Path(sys.argv[1])

def generate(engine, problems, sampling, seed):
    if seed[1] == 2:
        time.sleep(1000)
    return draw(engine, problems, sampling, seed)

TransformersEngine.generate = generate
with Watchdog(folder, 4.0) as watchdog:
    train(tiny_run(checkpoint_every=1), folder, watchdog)
"""


def test_a_sampler_that_hangs_ends_the_process_with_its_stacks_and_the_step_is_done_again(tmp_path: Path):
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == STATUS, done.stderr
    assert "drpo: rollout, step 3: not done in 4 s" in done.stderr and "--resume" in done.stderr
    stacks = (tmp_path / "run" / STALLED).read_text()
    assert "rollout, step 3" in stacks and "in generate" in stacks
    train(tiny_run(checkpoint_every=1), tmp_path / "run")
    train(tiny_run(checkpoint_every=1), tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_a_run_that_goes_on_is_left_alone(seconds: float, tmp_path: Path):
    with Watchdog(tmp_path, seconds) as watchdog:
        summary = train(tiny_run(), tmp_path, watchdog)
    assert summary["finished"] and not (tmp_path / STALLED).exists()
