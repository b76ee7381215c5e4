"""Restart a run in place of this process, when it is stuck or its engine has died."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch.distributed as dist


def restart(folder: Path, left: int, flags: Sequence[str], why: str) -> None:
    """Resume the run in a new process that replaces this one; return if no restart is left.

    Memory, threads and children of the process are discarded; its id stays, so a parent keeps waiting for it.
    torchrun restarts the processes that it started (`--max-restarts`).

    Args:
        folder: of the run.
        left: restarts left.
        flags: of `drpo train --resume RUN`, without `--restarts`.
        why: the reason, for the message.
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
