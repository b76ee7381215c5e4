"""`drpo report`."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from drpo.cli.options import parse
from drpo.errors import InputError
from drpo.report.run_page import write_report
from drpo.train.session import load_run

RUN = "RUN"


@dataclass(frozen=True)
class ReportOptions:
    """Write a run as one HTML file: curves, trust region, gradient weights, and every token of every completion.

    The file opens from disk and asks the network for nothing. `drpo train` writes one at its end; RUN may also be a run
    that is going on or was stopped.

    Args:
        out: the file; default report.html in the run's folder.
        open: show it in the browser.
    """

    out: Path | None = None
    open: bool = False


def report(arguments: list[str]) -> int:
    """`drpo report RUN [--out FILE] [--open]`."""
    if not arguments or arguments[0].startswith("-"):
        if "--help" not in arguments and "-h" not in arguments:
            raise InputError("report: name a run's folder first")
        arguments = [RUN, *arguments]
    name, *rest = arguments
    options = parse(ReportOptions, rest, f"drpo report {name}")
    folder = Path(name)
    run = load_run(folder)
    try:
        path = write_report(folder, run, options.out)
    except OSError as error:
        raise InputError(f"--out {options.out or folder}: cannot be written ({error})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its records cannot be read ({type(error).__name__}: {error})") from None
    print(f"report       {path}")
    if options.open:
        webbrowser.open(path.resolve().as_uri())
    return 0
