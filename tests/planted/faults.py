"""Mistakes about what is done, what is claimed and what is made up, when something comes between."""

import importlib
import json
from contextlib import nullcontext

from planted import Replacement

F = "tests/test_faults.py::"
S = "tests/test_states.py::test_"
V = "tests/test_verify.py::test_"
O = "tests/test_streams.py::test_"
BAD_INPUT = "tests/test_cli.py::test_bad_input_is_one_line_that_names_it_and_status_2"
W = "tests/test_watchdog.py::"
E = "tests/test_endings.py::test_"


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
    from drpo.train.records import read_json, read_records

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


def _finished_all_the_same(right):
    def wrong(folder, run, stopped_by=None, done=0, reason=None):
        return right(folder, run, stopped_by, done) | {"reason": reason}

    return wrong


REPLACEMENTS = (
    Replacement(
        "what ended a run is not recorded",
        "drpo.train.ending:reason",
        lambda right: lambda error, stopped_by=None: None,
        (f"{E}what_ends_a_run_is_its_reason", f"{E}a_reward_a_loss_and_a_signal_are_reasons"),
    ),
    Replacement(
        "a run that fails after its last step is called finished",
        "drpo.train.summary:summarise",
        _finished_all_the_same,
        (f"{E}a_run_that_fails_after_its_last_step_is_not_finished",),
    ),
    Replacement(
        "the reason of a session before is that of one that goes on",
        "drpo.train.ending:last_summary",
        lambda right: lambda folder: json.loads((folder / "summary.json").read_text()),
        (f"{E}a_reason_is_that_of_the_last_session",),
    ),
    Replacement(
        "a full disk ends a worker of a comparison with a traceback",
        "drpo.lab.worker_pool:suppress",
        lambda right: lambda *kinds: nullcontext(),
        ("tests/test_lab.py::test_a_full_disk_ends_no_worker_when_its_process_dies",),
    ),
    Replacement(
        "a report on a full disk blames the input",
        "drpo.cli.report:is_disk_full",
        lambda right: lambda error: False,
        ("tests/test_report_page.py::test_a_full_disk_names_the_file_and_is_no_fault_of_the_input",),
    ),
    Replacement(
        "half a surrogate pair in a name costs the report",
        "drpo.report.html:write",
        lambda right: (
            lambda page, path: path.write_text("".join(importlib.import_module("drpo.report.html").pieces(page)))
        ),
        ("tests/test_report_page.py::test_half_a_surrogate_pair_in_a_name_costs_no_report",),
    ),
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
        (f"{S}a_run_that_ends_before_its_first_checkpoint_is_gone_on_from[a second signal]",),
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
        "drpo.train.run_session:RunSession._require_no_lost_checkpoint",
        lambda right: lambda self: None,
        (f"{S}a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_records",),
    ),
    Replacement(
        "what a killed process left half written stays in the run's folder",
        "drpo.train.run_session:_tidy",
        lambda right: lambda folder: None,
        (f"{S}a_run_that_ends_before_its_first_checkpoint_is_gone_on_from[set-up]",),
    ),
    Replacement(
        "a callback that raises ends the run",
        "drpo.train.callbacks:CallbackList._call",
        lambda right: lambda self, call: [call(callback) for callback in self._callbacks],
        (f"{O}a_callback_that_raises_costs_one_line",),
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
        "a report that cannot be written ends a run that is done",
        "drpo.cli.train:attempt",
        lambda right: lambda what, folder, write: write(),
        (f"{O}a_report_that_cannot_be_written_costs_a_line",),
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
        "drpo.train.records:require_types",
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
        "drpo.train.config.groups:_require_engine",
        lambda right: lambda engine: None,
        (f"{BAD_INPUT}[train smoke --engine http://[::1]",),
    ),
    Replacement(
        "adapters may have any rank",
        "drpo.train.config.groups:MOST_RANK",
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
        "drpo.cli:message_of",
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
