"""Kills a run again and again and lets it go on each time: `main(FOLDER, KILLS, SEED)`, in a process of its own.

Half of the kills come at a random moment, half just before or after a random write to a file. The children are forks,
so that an import costs nothing.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drpo.rollout.transformers import TransformersEngine  # noqa: F401 (what a child would import late)
from drpo.train import checkpoint, log, tensor_files, warm_up
from drpo.train.config import Run
from drpo.train.loop import train
from support.worlds import tiny_run

WRITES: tuple[tuple[Any, str], ...] = (
    (tensor_files, "save_file"),
    (checkpoint, "_sync"),
    (log.RunLog, "write"),
    (warm_up, "append"),
    (warm_up, "write_json"),
    (Path, "write_text"),
    (Path, "rename"),
    (Path, "replace"),
)
RUN = tiny_run(steps=4, checkpoint_every=1, keep_checkpoints=2, eval_every=2, eval_problems=4)


def die_at(write: int) -> None:
    """Let this process kill itself at its n-th write: before it where n is even, after it where odd."""
    left = [write]

    def fatal(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and write % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **named)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for owner, name in WRITES:
        setattr(owner, name, fatal(getattr(owner, name)))


def child(folder: Path, write: int | None, run: Run) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        if write is not None:
            die_at(write)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        train(run, folder)
    except BaseException as error:
        (folder / "error").write_text(repr(error))
        os._exit(3)
    os._exit(0)


def main(folder: Path, kills: int, seed: int, run: Run = RUN) -> None:
    torch.set_num_threads(1)
    draw, killed, runs, seconds = random.Random(seed), 0, 0, 2.0
    while killed < kills or runs == 0:
        write = draw.randint(1, 60) if killed % 2 else None
        begun = time.monotonic()
        pid = child(folder / f"run-{runs}", write if killed < kills else None, run)
        if write is None and killed < kills:
            time.sleep(draw.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            sys.exit((folder / f"run-{runs}" / "error").read_text())
        else:
            runs, seconds = runs + 1, max(0.3, time.monotonic() - begun)
    pid = child(folder / f"run-{runs}", None, run)  # the last one was killed, or not begun: it too must come to its end
    if os.waitpid(pid, 0)[1]:
        sys.exit((folder / f"run-{runs}" / "error").read_text())
    print(json.dumps({"killed": killed, "runs": runs + 1}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
