"""Mistakes about what is done, what is claimed and what is made up, when something comes between."""

from planted import Bug

F = "tests/test_faults.py::"
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
        "train/checkpoint.py",
        'if re.fullmatch(r"step-\\d+", p.name)), key=_step)',
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
