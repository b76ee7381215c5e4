"""Begins a run again in this process's place, where the process is stuck or its engine has died."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch.distributed as dist


def begin_again(folder: Path, left: int, flags: Sequence[str], why: str) -> None:
    """Replace this process by one that resumes the run; return where it may not.

    Whatever hangs or has died is gone with the process's memory, threads and children; its number stays, so whoever
    waits for it goes on waiting. Processes that torchrun started are torchrun's to begin again (`--max-restarts`).

    Args:
        folder: of the run.
        left: how often it may still be begun again.
        flags: of `drpo train --resume RUN`, but for `--restarts`.
        why: what has happened.
    """
    if left <= 0 or dist.is_torchelastic_launched():
        return
    print(f"drpo: {why}; beginning again from the last checkpoint of {folder}", file=sys.stderr, flush=True)
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=10)
    resume = ["train", "--resume", str(folder), *flags, "--restarts", str(left - 1)]
    os.execv(sys.executable, [sys.executable, "-m", "drpo", *resume])
