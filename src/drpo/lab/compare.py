"""Trains the trials of a comparison, resumes interrupted ones, and saves the results."""

from collections.abc import Callable, Sequence
from pathlib import Path

from drpo.errors import InputError
from drpo.files import require_own
from drpo.lab.trial_result import Comparison, read_comparison, read_trial, save_results, trial_folders
from drpo.lab.worker_pool import LOG, PoolSize, WorkerPool
from drpo.train.config import load_run
from drpo.train.records import RESULTS, TRIALS
from drpo.train.stop import StopRequest

TICK = 1.0
"""Seconds between two polls of the trials."""


def begun(folder: Path) -> list[Path]:
    """Return the folders of a comparison's trials.

    Raises:
        InputError: no trials there.
    """
    trials = trial_folders(folder)
    if not trials:
        raise InputError(f"{folder}: no comparison there ({TRIALS}/ is missing or empty)")
    return trials


def compare(
    folder: Path,
    trials: Sequence[Path],
    size: PoolSize,
    tick: Callable[[WorkerPool], None],
    note: Callable[[str], None],
) -> tuple[Comparison, int | None]:
    """Train the trials that have no result yet, and write results.json.

    A trial that was stopped or failed resumes from its last checkpoint.

    Args:
        folder: of the comparison.
        trials: folders of its trials, in the order of training.
        size: of the worker pool.
        tick: called once a second.
        note: receives messages for the user.

    Returns:
        The comparison, and the signal that ended it early, or None.
    """
    todo = [trial for trial in trials if not read_trial(trial).over]
    for path in (folder / TRIALS, *todo):
        require_own(path)
    with StopRequest(note) as stop:
        pool = WorkerPool(todo, size, folder / LOG)
        try:
            passed_on = False
            while not pool.wait(TICK):
                tick(pool)
                if stop.signal is not None and not passed_on:
                    pool.interrupt()
                    passed_on = True
            tick(pool)
        except BaseException:
            pool.kill()
            raise
        finally:
            pool.close()
    comparison = read_comparison(folder)
    save_results(comparison, folder / RESULTS)
    return comparison, stop.signal


def models_of(trials: Sequence[Path]) -> set[str]:
    """Return the models of the trials."""
    return {load_run(trial).model.name for trial in trials}
