"""A command that must be done by some time. Standard library only."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence


def output_of(command: Sequence[str], until: float) -> tuple[str, bool]:
    """Run a command, and end it with all processes that it began where it takes too long.

    Args:
        command: program and arguments.
        until: as `time.time` counts.

    Returns:
        What it printed, and whether it was done by then.

    Example:
        >>> output_of(["echo", "a"], time.time() + 60)
        ('a\\n', True)
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=max(0.0, until - time.time()))
            done = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done = False
        out.seek(0)
        return out.read(), done
