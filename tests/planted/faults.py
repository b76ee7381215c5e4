"""Mistakes about what is done, what is claimed and what is made up, when something comes between."""

import json
from contextlib import nullcontext

from planted import Bug, Replacement

F = "tests/test_faults.py::"
S = "tests/test_states.py::test_"
V = "tests/test_verify.py::test_"
O = "tests/test_streams.py::test_"
BAD_INPUT = "tests/test_cli.py::test_bad_input_is_one_line_that_names_it_and_status_2"
L = "tests/test_launched.py::"
W = "tests/test_watchdog.py::"
CUT = f"{F}test_an_evaluation_that_was_cut_short_is_made_up"
AGAIN = f"{W}test_a_run_begins_again_in_the_place_of_its_process[hangs, again]"
CLAIMED = f"{F}test_a_step_that_could_not_be_recorded_is_not_claimed"
REWOUND = f"{F}test_a_file_is_rewound_to_a_step"
ANEW = f"{F}test_a_damaged_checkpoint_is_written_anew"
MILLION = f"{F}test_the_millionth_checkpoint_is_the_newest_and_links_are_dropped_as_links"

BUGS = (
    Bug(
        19,
        "a step is claimed before it is recorded",
        "train/session.py",
        "        if self._ranks.first:\n            figures =",
        "        self._done, self._between_steps = done, True\n        if self._ranks.first:\n            figures =",
        (CLAIMED,),
    ),
    Bug(
        19,
        "half of the records stay when the disk is full",
        "train/log.py",
        "                out.truncate(before)\n",
        "",
        (f"{F}test_records_that_do_not_fit_leave_the_file_as_it_was",),
    ),
    Bug(
        19,
        "a text that is half a pair ends the run",
        "train/log.py",
        'text.encode("utf-8", "replace")',
        'text.encode("utf-8")',
        (f"{F}test_broken_text_is_recorded",),
    ),
    Bug(
        19,
        "runs that begin together share a folder",
        "cli/train.py",
        "            candidate.mkdir()\n",
        "            candidate.mkdir(exist_ok=True)\n",
        (f"{F}test_runs_that_begin_together_take_folders_of_their_own",),
    ),
    Bug(
        19,
        "a line that a crash cut short is kept",
        "train/log.py",
        '        end = text.rfind(b"\\n") + 1\n        while end:',
        "        end = len(text)\n        while end:",
        (REWOUND,),
    ),
    Bug(
        19,
        "the records of the step that is gone on from are forgotten",
        "train/log.py",
        '[1]["step"] <= step:',
        '[1]["step"] < step:',
        (REWOUND,),
    ),
    Bug(
        19,
        "updates skipped in a row are forgotten at a stop",
        "train/session.py",
        'self._count_skipped("policy", self._done.skipped, stats)',
        'self._count_skipped("policy", 0, stats)',
        (f"{F}test_updates_skipped_in_a_row_are_counted_across_a_stop",),
    ),
    Bug(
        19,
        "an evaluation that failed is not done again",
        "train/session.py",
        "        due = step in (0, self.run.steps) or _due(self.run.eval_every, step)\n",
        "        due = step in (0, self.run.steps)\n",
        (f"{CUT}[fails-2]",),
    ),
    Bug(
        19,
        "a signal waits for the evaluation's end",
        "train/stop.py",
        "        if self._interrupts:\n            raise Interrupted\n",
        "",
        (f"{CUT}[is stopped-2]",),
    ),
    Bug(
        19,
        "a terminal's and a launcher's signal are two requests",
        "train/stop.py",
        "            if now - self._since > SAME_REQUEST_S:\n",
        "            if True:\n",
        (f"{F}test_two_signals_at_once_are_one_request_and_a_later_one_is_meant",),
    ),
    Bug(
        19,
        "what the ranks agreed on overwrites a signal that came meanwhile",
        "train/session.py",
        "        self._stopped_by = self._ranks.most(self._stop.signal or 0) or None\n",
        "        self._stopped_by = self._stop.signal = self._ranks.most(self._stop.signal or 0) or None\n",
        (f"{F}test_a_signal_that_comes_while_the_others_are_asked_is_not_lost",),
    ),
    Bug(
        19,
        "two processes train in one folder",
        "train/lock.py",
        "            if error.errno in (errno.EACCES, errno.EAGAIN):\n",
        "            if error.errno == errno.EPERM:\n",
        (f"{F}test_a_folder_is_trained_in_by_one_process",),
    ),
    Bug(
        19,
        "a damaged checkpoint keeps its name",
        "train/session.py",
        "            checkpoint.tidy(self.folder / CHECKPOINTS, last)\n",
        "            pass\n",
        (ANEW,),
    ),
    Bug(
        19,
        "what a crash left half written is never cleared away",
        "train/checkpoint.py",
        '    for path in folder.glob(f".step-*{SCRATCH}"):\n        remove(path)\n',
        "",
        (ANEW,),
    ),
    Bug(
        19,
        "checkpoints are sorted as words",
        "train/stored.py",
        'if re.fullmatch(r"step-\\d+", p.name)), key=step_of)',
        'if re.fullmatch(r"step-\\d+", p.name)))',
        (MILLION,),
    ),
    Bug(
        19,
        "a link to a checkpoint is dropped as if it were one",
        "files.py",
        "    if path.is_dir() and not path.is_symlink():\n",
        "    if path.is_dir():\n",
        (MILLION,),
    ),
    Bug(
        2,
        "what fails on one process leaves the others waiting",
        "ranks.py",
        "        found = self.gather([] if own is None else",
        "        if own is not None:\n            raise own\n        found = self.gather([] if own is None else",
        (f"{L}test_an_engine_that_dies_on_one_process_costs_no_step[launcher0-6]",),
    ),
    Bug(
        19,
        "what failed on all is not saved",
        "train/session.py",
        "            self._failed_together = True\n",
        "",
        (f"{L}test_an_engine_that_dies_on_one_process_costs_no_step[launcher0-6]",),
    ),
    Bug(
        19,
        "what an engine has started outlives it",
        "cli/again.py",
        "            child.kill()\n",
        "            pass\n",
        (AGAIN,),
    ),
    Bug(
        19,
        "the stacks of a phase that stalled are lost when the run begins again",
        "train/watchdog.py",
        'open(self._path, "a", encoding="utf-8"',
        'open(self._path, "w", encoding="utf-8"',
        (AGAIN,),
    ),
)


def _raise(error):
    raise error


def _refusing_any(right):
    def wrong(folder, run):
        from drpo.errors import InputError

        if (folder / "config.json").exists():
            raise InputError("a run is there")

    return wrong


def _begun_anew(right):
    def wrong(self, file, *records):
        path = self.folder / file
        self._written.pop(file, None)
        return right(self, file, *records) if path.parent.exists() else None

    return wrong


def _looking_first(right):
    def wrong(self, *about):
        right(self, *about)
        return self._path.parent.stat()

    return wrong


def _having_all_steps(right):
    from drpo.train.log import read_json, read_records

    return lambda folder: len(read_records(folder / "metrics.jsonl")) >= read_json(folder / "config.json")["steps"]


def _leaving(right):
    def wrong(self, *about):
        right(self, *about)
        self._path.touch()

    return wrong


def _file_by_file(right):
    def wrong(self, step):
        files = self._files
        for self._files in ((file,) for file in files):
            right(self, step)
        self._files = files

    return wrong


REPLACEMENTS = (
    Replacement(
        "files are rewound before it is known that all can be read",
        "drpo.train.log:RunLog.rewind",
        _file_by_file,
        (f"{F}test_no_file_is_rewound_where_one_cannot_be_read",),
    ),
    Replacement(
        "a run that ended before it began leaves an empty file for stacks",
        "drpo.train.watchdog:Watchdog.__exit__",
        _leaving,
        (f"{W}test_a_run_that_ends_before_it_begins_leaves_the_file_only_where_it_found_it[False]",),
    ),
    Replacement(
        "a write that the system refuses does not say of which file",
        "drpo.files:naming",
        lambda right: lambda path: nullcontext(),
        (
            f"{F}test_records_that_do_not_fit_leave_the_file_as_it_was",
            "tests/test_saving.py::test_a_disk_that_is_full_while_the_model_is_written_is_no_fault_of_the_model",
        ),
    ),
    Replacement(
        "a lock that cannot be removed hides what ended the run",
        "drpo.train.lock:suppress",
        lambda right: lambda *kinds: nullcontext(),
        (f"{F}test_a_lock_that_cannot_be_removed_does_not_hide_what_ended_the_run",),
    ),
    Replacement(
        "a checkpoint's state is read without a thought for what it may hold",
        "drpo.train.stored:parse_json",
        lambda right: lambda text: json.loads(text),
        (f"{V}a_checkpoint_whose_state_makes_no_sense_is_one_line[deep]",),
    ),
    Replacement(
        "a run that ended before its first checkpoint is taken for one that is done",
        "drpo.cli.train:is_finished",
        lambda right: lambda folder: True,
        (f"{S}a_run_that_ends_before_its_first_checkpoint_is_gone_on_from[a reward]",),
    ),
    Replacement(
        "a run whose steps are all recorded is taken for one that is done",
        "drpo.cli.train:is_finished",
        _having_all_steps,
        (f"{S}a_run_that_is_killed_behind_its_last_step_and_before_its_first_checkpoint_is_gone_on_from",),
    ),
    Replacement(
        "a configuration that is half written is taken for a run",
        "drpo.cli.train:_require_free",
        _refusing_any,
        (f"{S}a_configuration_that_was_never_written_whole_is_written_again[half]",),
    ),
    Replacement(
        "a run whose checkpoints are gone is begun anew over its records",
        "drpo.train.session:Session._require_no_lost_checkpoint",
        lambda right: lambda self: None,
        (f"{S}a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_records",),
    ),
    Replacement(
        "what a killed process left half written stays in the run's folder",
        "drpo.train.session:_tidy",
        lambda right: lambda folder: None,
        (f"{S}a_run_that_ends_before_its_first_checkpoint_is_gone_on_from[set-up]",),
    ),
    Replacement(
        "a watcher that raises ends the run",
        "drpo.train.watch:Together._tell",
        lambda right: lambda self, tell: [tell(watcher) for watcher in self._watchers],
        (f"{O}a_watcher_that_raises_costs_one_line",),
    ),
    Replacement(
        "output that takes no more ends the training",
        "drpo.cli.streams:Stream._try",
        lambda right: lambda self, do: do(),
        (f"{O}training_goes_on_without_its_output[full]", f"{O}an_error_that_cannot_be_told_keeps_its_status"),
    ),
    Replacement(
        "a letter that the output does not have ends the training",
        "drpo.cli.streams:_lenient",
        lambda right: lambda stream: stream,
        (f"{O}letters_that_an_output_does_not_have_are_replaced",),
    ),
    Replacement(
        "a file gets the number of a stream that is closed",
        "drpo.cli.streams:_open_missing",
        lambda right: lambda: None,
        (f"{O}no_file_gets_the_number_of_a_stream_that_is_closed[>&-]",),
    ),
    Replacement(
        "curves that cannot be drawn end a run that is done",
        "drpo.cli.train:attempt",
        lambda right: lambda what, folder, write: write(),
        (f"{O}pictures_that_cannot_be_drawn_cost_a_line_each",),
    ),
    Replacement(
        "records are not compared with the checkpoint's sums",
        "drpo.train.log:RunLog.require",
        lambda right: lambda self, written: None,
        (f"{V}a_run_does_not_go_on_with_records_that_are_not_its_own[middle]",),
    ),
    Replacement(
        "records that vanish during a run are begun anew",
        "drpo.train.log:RunLog.write",
        _begun_anew,
        (f"{V}records_that_vanish_during_the_run_end_it",),
    ),
    Replacement(
        "drpo verify believes a checkpoint",
        "drpo.train.verify:_checkpoint",
        lambda right: lambda checkpoint: "fine",
        (f"{V}whatever_is_damaged_is_named[checkpoints/step-000002/weights.safetensors]",),
    ),
    Replacement(
        "text is taken for a number",
        "drpo.train.records:_require_types",
        lambda right: lambda *given: None,
        (f"{V}a_field_of_the_wrong_type_is_named_in_one_line",),
    ),
    Replacement(
        "a negative seed cannot be drawn",
        "drpo.report.distribution:scatter_plots",
        lambda right: lambda runs, own, seed: right(runs, own, seed) if seed >= 0 else _raise(ValueError("seed")),
        ("tests/test_report.py::test_a_run_of_any_seed_can_be_drawn",),
    ),
    Replacement(
        "an address of an engine is not looked at",
        "drpo.train.config:_require_engine",
        lambda right: lambda engine: None,
        (f"{BAD_INPUT}[train smoke --engine http://[::1]",),
    ),
    Replacement(
        "adapters may have any rank",
        "drpo.train.config:MOST_RANK",
        lambda right: 2**62,
        (f"{BAD_INPUT}[train smoke --lora-rank 1000000000]",),
    ),
    Replacement(
        "memory that is used up is a traceback",
        "drpo.cli:is_out_of_memory",
        lambda right: lambda error: False,
        (f"{O}what_the_machine_refuses_is_one_line",),
    ),
    Replacement(
        "what the operating system refuses is a traceback",
        "drpo.cli:_of_the_system",
        lambda right: _raise,
        (f"{O}what_the_machine_refuses_is_one_line",),
    ),
    Replacement(
        "the watchdog's file hides why a run ended",
        "drpo.train.watchdog:Watchdog.__exit__",
        _looking_first,
        (f"{O}a_folder_that_goes_away_is_one_line[removed]",),
    ),
)
