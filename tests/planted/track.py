"""Mistakes of trackers: figures that are lost, and trackers that reach into the run."""

from planted import Bug

T = "tests/test_track.py::"
FAILS = f"{T}test_a_tracker_that_fails_costs_a_line_and_not_a_bit_of_the_run"
FILE = "report/track.py"

BUGS = (
    Bug(
        19,
        "a step's single updates are not sent",
        FILE,
        'figures = {name: value for name, value in metrics.items() if name != "step"}',
        'figures = {name: value for name, value in metrics.items() if name not in ("step", "updates")}',
        (f"{T}test_a_tracker_gets_all_that_the_files_say",),
    ),
    Bug(
        20,
        "a tracker that raises ends its thread without a word",
        FILE,
        "except BaseException as error:  # a package may also try to exit",
        "except ValueError as error:",
        (FAILS,),
    ),
    Bug(
        20,
        "the run waits for a tracker that hangs",
        FILE,
        "self._queue.put_nowait(item)",
        "self._queue.put(item)\n                while self._queue.qsize() and item:\n"
        "                    threading.Event().wait(0.5)",
        (f"{FAILS}[open-0-hang]",),
    ),
    Bug(
        20,
        "a tracker of a run that crashed writes nothing",
        FILE,
        "if self._thread is None or self._dropped.is_set():",
        "if kind is not None or self._thread is None or self._dropped.is_set():",
        (f"{T}test_a_run_that_resumes_goes_on_at_its_step",),
    ),
    Bug(
        20,
        "a tracker that resumes keeps the steps that a crash undid",
        FILE,
        "purge_step=step + 1 if step else 0",
        "purge_step=None",
        (f"{T}test_tensorboard_reads_what_the_files_say",),
    ),
)
