"""Tests of this repository, run by pytest within a limit of time; what had ended by then counts."""

import re
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.workers.commands import output_of
from benchmarks.workers.measure import Meter
from benchmarks.workers.protocol import Record, Repetition, serve

OUTCOME_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def outcome(text: str) -> Record:
    """Return how many tests ended how, by the lines of `pytest -v`, and the names of those that failed.

    Example:
        >>> outcome("t.py::test_a[1 x] PASSED [ 50%]\\nt.py::test_b FAILED [100%]\\n")
        {'passed': 1, 'failed': 1, 'skipped': 0, 'names': ['t.py::test_b']}
    """
    ends = OUTCOME_LINE.findall(text)
    names = [name for name, end in ends if end in ("FAILED", "ERROR")]
    count = {word: sum(end == word.upper() for _, end in ends) for word in ("passed", "skipped")}
    return {"passed": count["passed"], "failed": len(names), "skipped": count["skipped"], "names": names}


def prepare(setup: Mapping[str, Any]) -> tuple[Record, Repetition]:
    """A request has "paths", "marker", "match" and "until", by the clock; nothing is run where that is None."""
    meter = Meter()

    def repetition(request: Mapping[str, Any]) -> Record:
        options = ("-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=line", "--color=no")
        chosen = ("-m", request["marker"], "-k", request["match"], *request["paths"])
        meter.start()
        if request["until"] is None:
            return meter.stop()
        text, done = output_of([sys.executable, "-m", "pytest", *options, *chosen], request["until"])
        result = outcome(text)
        if not result["passed"] + result["failed"]:
            raise RuntimeError(f"no test ran: {(text.strip().splitlines() or ['it said nothing'])[-1]}")
        return {**result, "done": done, **meter.stop()}

    return {"settings": "pytest"}, repetition


if __name__ == "__main__":
    serve(prepare)
