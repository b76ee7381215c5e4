"""The committed results of all machines side by side, in docs/performance.md: `python -m benchmarks.page`.

The table stands between `<!-- table machines -->` and `<!-- end -->`; a test checks that it is current.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from benchmarks.rounds import FLOOR, times
from benchmarks.table import spread

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SHOWN: Mapping[str, tuple[tuple[str, str], ...]] = {
    "step": (("drpo", FLOOR), ("TRL, 16 x 4", "drpo")),
    "rollout": (("transformers", "drpo"), ("vLLM", "drpo")),
    "head": (("linear_policy_loss", "products alone"), ("log_softmax", "products alone")),
    "turns": (("turns, kept", "one turn"),),
    "overlap": (("overlapped", "in turn"),),
    "neighbours": (("beside a busy program", "alone"),),
}
"""Part -> which seconds are divided by which."""
Results = Mapping[str, Any]


def committed() -> list[Results]:
    """Return the results of each machine, in the order of their files."""
    files = sorted(path for path in FOLDER.glob("*.json") if not path.stem.endswith("-quick"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def table(machines: Sequence[Results]) -> str:
    """Return the table: a row for each ratio that a machine has, a column for each machine.

    Args:
        machines: results, as their files hold them.
    """
    columns = [_cells(results) for results in machines]
    names = list(dict.fromkeys(name for cells in columns for name in cells))
    order = {part: i for i, part in enumerate(SHOWN)}
    names.sort(key=lambda name: order[name[0]])
    head = ["case", "seconds of", *(_heading(results["machine"]) for results in machines)]
    rows = [
        [f"{part}: {case}", pair, *(cells.get((part, case, pair), "-") for cells in columns)]
        for part, case, pair in names
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _heading(machine: Mapping[str, Any]) -> str:
    flags = [flag for flag, present in machine["flags"].items() if present]
    best = flags[-1].upper().replace("_", "-") if flags else "no AVX"
    return machine["accelerator"] or f"{machine['processor']}, {machine['cores']} cores, {best}"


def _cells(results: Results) -> dict[tuple[str, str, str], str]:
    """Return part, case and pair -> the median ratio with least and greatest, and how many rounds."""
    cells = {}
    for record in results["cases"]:
        for ours, other in SHOWN.get(record["part"], ()):
            values = times(record, ours, other)
            if values:
                rounds = f"{len(values)} round{'s' if len(values) > 1 else ''}"
                cells[record["part"], record["name"], f"{ours} / {other}"] = f"{spread(values)}, {rounds}"
    return cells


def filled(text: str) -> str:
    """Return the page with the table updated."""
    begin, end = "<!-- table machines -->\n", "<!-- end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}{table(committed())}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
