"""`drpo report`: its options."""

from dataclasses import dataclass
from pathlib import Path

from drpo.cli.options import leading, parse
from drpo.cli.output import require_file
from drpo.cli.runs import require_run
from drpo.errors import as_typed
from drpo.spec import import_named
from drpo.train.records import RESULTS


@dataclass(frozen=True)
class ReportOptions:
    """Write a run or a comparison as one HTML file.

      drpo report runs/demo --open

    For a run: curves, trust region, gradient weights, and every token of every completion. For a comparison: curves and
    final scores of every objective with intervals, differences per seed, significant differences, and every trial.

    The file opens from disk and makes no network requests. `drpo train` and `drpo compare` write one at their end. RUN
    may also be a run in progress or a stopped one.

    Args:
        out: the file; default report.html in the folder.
        open: show it in the browser.
        trust_remote_code: import the objective that the run's configuration names as module:name; only for folders
            that you trust.
    """

    out: Path | None = None
    open: bool = False
    trust_remote_code: bool = False


def report(arguments: list[str]) -> int:
    """`drpo report RUN|COMPARISON [--out FILE] [--open]`."""
    name, rest = leading(arguments, "RUN|COMPARISON", "report: name a run's folder first, or a comparison's")
    options = parse(ReportOptions, rest, f"drpo report {as_typed(name)}")
    if options.out is not None:
        require_file("--out", options.out)
    if not (Path(name) / RESULTS).exists():  # what is kept of a comparison's runs
        require_run(Path(name))
    return int(import_named("drpo.cli.report", "report", "command")(Path(name), options))
