"""The implementation of `drpo report`."""

import webbrowser
from pathlib import Path

from drpo.cli.commands.report import ReportOptions
from drpo.cli.folder import open_run
from drpo.cli.runs import reading
from drpo.errors import InputError, is_disk_full, printable
from drpo.lab.trial_result import is_comparison, read_comparison
from drpo.lazily import lazily
from drpo.report.run_page import write_report
from drpo.report.sft_page import write_sft_report
from drpo.train.records import is_sft

comparison_page = lazily("drpo.report.comparison_page")  # whose statistics take a second to import


def report(folder: Path, options: ReportOptions) -> int:
    """Write a run or a comparison as one HTML file."""
    try:
        with reading(folder):
            path = _write(folder, options)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise InputError(f"--out {options.out or folder}: cannot be written ({error})") from None
    print(printable(f"report       {path}"))
    if options.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def _write(folder: Path, options: ReportOptions) -> Path:
    if is_comparison(folder):
        path: Path = comparison_page.write_comparison_report(folder, read_comparison(folder), options.out)
        return path
    if is_sft(folder):
        return write_sft_report(folder, options.out)
    # Only the objective is evaluated; the other specs are only shown.
    return write_report(folder, open_run(folder, options.trust_remote_code, needed=("objective",)), options.out)
