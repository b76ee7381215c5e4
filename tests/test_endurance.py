"""Runs that are killed again and again, and one that goes on for a long time."""

import json
import statistics
from pathlib import Path

import psutil
import pytest

from drpo.train.callbacks import NullCallback
from drpo.train.loop import train
from support import killer
from support.forks import fork
from support.killer import RUN
from support.runs import assert_same_run
from support.worlds import tiny_run


def killed_again_and_again(folder: Path, kills: int, seed: int) -> None:
    status, out = fork(folder / "killer", killer.main, folder, kills, seed).end()
    assert status == 0, out[-2000:]
    said = json.loads(out.splitlines()[-1])
    assert said["killed"] == kills
    train(RUN, folder / "whole")
    for i in range(said["runs"]):
        assert_same_run(folder / "whole", folder / f"run-{i}")
        assert not list((folder / f"run-{i}" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_killed_three_times_it_is_one_run(one_thread: None, tmp_path: Path):
    killed_again_and_again(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_sixty_times_it_is_one_run(one_thread: None, tmp_path: Path):
    killed_again_and_again(tmp_path, 60, seed=2)


class Vitals(NullCallback):
    """Memory and open files, after every hundred steps."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.memory: list[int] = []
        self.files: list[int] = []

    def stepped(self, step: int, *rest: object) -> None:
        if step % 100 == 0:
            self.memory.append(self.process.memory_info().rss)
            self.files.append(self.process.num_fds())


@pytest.mark.slow
def test_two_thousand_steps_leak_nothing(tmp_path: Path):
    watch = Vitals()
    train(tiny_run(steps=2000, checkpoint_every=200, eval_every=500), tmp_path, watch)
    print(f"MiB: {[m >> 20 for m in watch.memory]}\nfiles: {watch.files}")
    settled, last = statistics.median(watch.memory[3:6]), statistics.median(watch.memory[-3:])
    assert last < 1.02 * settled
    assert max(watch.files[3:]) == min(watch.files[3:])
