"""A worker process that trains trials of a comparison: reads a folder per line, writes its result."""

import fcntl
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from drpo.errors import BrokenLogpError, InputError
from drpo.files import opened_here
from drpo.lab.trial_result import DIVERGED, FAILED, FINISHED, STOPPED, TRIAL_RESULT, write_trial_result
from drpo.train.config import load_run
from drpo.train.loop import train
from drpo.train.records import METRICS, read_records

log = logging.getLogger("drpo")


def train_trial(folder: Path) -> dict[str, Any]:
    """Train the run of a folder from its last checkpoint, and write its result.

    Non-finite numbers after the first step are a divergence, which is a result; before, they are a failure.

    Args:
        folder: holds the run's config.json.

    Returns:
        "status" and "reason", as in `trial_result.json`.
    """
    with _locked(folder):
        (folder / TRIAL_RESULT).unlink(missing_ok=True)
        status, reason = _end_of(folder)
        result = {"status": status, "reason": reason}
        write_trial_result(folder, result)
    gc.collect()  # reference cycles hold the model and its optimiser
    return result


def _end_of(folder: Path) -> tuple[str, str | None]:
    try:
        summary = train(load_run(folder), folder, keep_model=False)
    except (FloatingPointError, BrokenLogpError) as error:
        steps = len(read_records(folder / METRICS))
        return (DIVERGED if steps else FAILED), f"in step {steps + 1}: {error}"
    except InputError as error:
        return FAILED, str(error)
    except KeyboardInterrupt:
        return STOPPED, "interrupted"
    except Exception as error:  # a failed trial must not end the others
        log.exception("%s failed", folder)
        return FAILED, f"{type(error).__name__}: {error}"
    return (FINISHED, summary["warning"]) if summary["finished"] else (STOPPED, "interrupted")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder; wait for a process of a killed comparison that still trains this trial."""
    with open(folder / "lock", "a", opener=opened_here) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _stop_without(parent: int) -> None:
    """Interrupt this process, after its step, once the comparison's process is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    """Serve until the input ends; the argument is the parent's process id."""
    # Output of libraries goes to the log; the pipe carries answers only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_stop_without, args=(int(sys.argv[1]),), daemon=True).start()
    try:
        for line in sys.stdin:
            answers.write(json.dumps(train_trial(Path(line.rstrip("\n")))) + "\n")
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


if __name__ == "__main__":
    main()
