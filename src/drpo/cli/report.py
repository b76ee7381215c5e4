"""`drpo report`."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from drpo.cli.folder import open_run, reading
from drpo.cli.options import leading, parse
from drpo.cli.output import require_file
from drpo.errors import InputError, printable
from drpo.lab.outcome import is_comparison, read_comparison
from drpo.report.comparison_page import write_comparison_report
from drpo.report.run_page import write_report


@dataclass(frozen=True)
class ReportOptions:
    """Write a run or a comparison as one HTML file.

      drpo report runs/demo --open

    Of a run: curves, trust region, gradient weights, and every token of every completion. Of a comparison: curves and
    ends of every objective with intervals, differences seed by seed, what may be claimed, and every cell.

    The file opens from disk and asks the network for nothing. `drpo train` and `drpo compare` write one at their end;
    RUN may also be a folder that is worked on or was stopped.

    Args:
        out: the file; default report.html in the folder.
        open: show it in the browser.
        own_code: import the objective that the run's configuration names as module:name; only for folders that you
            trust.
    """

    out: Path | None = None
    open: bool = False
    own_code: bool = False


def report(arguments: list[str]) -> int:
    """`drpo report RUN|COMPARISON [--out FILE] [--open]`."""
    name, rest = leading(arguments, "RUN|COMPARISON", "report: name a run's folder first, or a comparison's")
    options = parse(ReportOptions, rest, f"drpo report {name}")
    folder = Path(name)
    if options.out is not None:
        require_file("--out", options.out)
    try:
        with reading(folder):
            path = _write(folder, options)
    except OSError as error:
        raise InputError(f"--out {options.out or folder}: cannot be written ({error})") from None
    print(printable(f"report       {path}"))
    if options.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def _write(folder: Path, options: ReportOptions) -> Path:
    if is_comparison(folder):
        return write_comparison_report(folder, read_comparison(folder), options.out)
    # The objective is asked about every token; the others need only be shown as they are spelled.
    return write_report(folder, open_run(folder, options.own_code, needed=("objective",)), options.out)
