"""Mistakes in reading a run's folder while another process writes it, and in going on with what is there."""

from planted import Bug

T = "tests/test_watch.py::"
PARTS = f"{T}test_what_is_read_in_parts_is_what_is_there"
FILE = "report/follow.py"

BUGS = (
    Bug(
        20,
        "a line not yet ended is taken for whole",
        FILE,
        'whole = new[: new.rfind(b"\\n") + 1]',
        "whole = new",
        (PARTS,),
    ),
    Bug(
        20,
        "a file that was rewound goes on where it was",
        FILE,
        "if file.read(len(self._last)) != self._last:",
        "if False:",
        (PARTS,),
    ),
    Bug(
        20,
        "only a shorter file counts as rewound",
        FILE,
        "if file.read(len(self._last)) != self._last:",
        "if len(file.read(len(self._last))) != len(self._last):",
        (f"{T}test_a_run_that_resumed_and_went_further_is_read_anew",),
    ),
    Bug(
        20,
        "a file is read again from its beginning at every look",
        FILE,
        "                file.seek(self._offset - len(self._last))\n",
        "                self._forget()\n                file.seek(0)\n",
        (f"{T}test_only_what_is_new_is_read",),
    ),
    Bug(
        20,
        "a last line longer than the block that is looked at is not found",
        FILE,
        "if length >= min(size, _MOST_BYTES):",
        "if length >= 16:",
        (f"{T}test_the_last_record_whatever_the_length_of_lines",),
    ),
    Bug(
        20,
        "a crash in the midst of a letter makes the file unreadable",
        "train/records.py",
        """    with path.open("rb") as lines:  # as bytes, since the cut may go through a letter
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\\n"):
                text, record = read_line(line, f\"{path} line {number}\")""",
        """    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith("\\n"):
                text, record = read_line(line.encode(), f\"{path} line {number}\")""",
        (PARTS,),
    ),
    Bug(
        20,
        "the summary of the session before counts as the run's end",
        FILE,
        "old = _written(self.folder / SUMMARY) < _written(self.folder / ENVIRONMENT)",
        "old = False",
        (f"{T}test_a_run_that_goes_on_is_running_until_its_own_summary",),
    ),
    Bug(
        19,
        "a figure that is no number is drawn",
        FILE,
        "if math.isfinite(value)}",
        "if value is not None}",
        (f"{T}test_figures_that_are_no_numbers_are_left_out_of_curves",),
    ),
    Bug(
        20,
        "the evaluation before training is recorded again by a run that resumes before its first checkpoint",
        "train/session.py",
        'if due and all(record["step"] != step for record in read_records(self.folder / EVALUATIONS)):',
        "if due:",
        ("tests/test_train.py::test_killed_before_its_first_checkpoint_it_is_one_run_too",),
    ),
)
