"""The table framework x version x objective -> largest error of a gradient, made by the tests of the adapters.

Tests call `record`; `python -m tests.adapters.parity` puts what they found into docs/parity.json and the table of
docs/frameworks.md.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .cases import OF_2026, SEQUENCES_2026

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".adapters" / "parity"
FIGURES = ROOT / "docs" / "parity.json"
PAGE = ROOT / "docs" / "frameworks.md"
RAN = {
    ("TRL, loss_type=dr_grpo", "1.16.0"): "[yes, on a CPU](../cluster/trl/README.md)",
    ("verl, ppo_loss", "0.9.1"): "[yes, on a CPU](../cluster/verl/README.md#a-whole-run-on-one-cpu)",
    ("OpenRLHF, seq-mean-token-mean", "0.11.2"): "[yes, on a CPU](../cluster/openrlhf/README.md)",
}
"""Framework and version, as the table names them -> the page that tells of a run by the framework's own trainer, from a
command line to its last step and a checkpoint that `drpo eval` reads. What is not here has not."""
REFUSED = {
    "SkyRL": ("mask(0.1) + 0.002*k2",),
    "Tinker, custom loss": ("mask(0.1) + 0.002*k2",),
    "open-instruct": ("gspo(0.1, 0.1)", *SEQUENCES_2026),
    "torchtitan": ("gspo(0.1, 0.1)", *SEQUENCES_2026),
}
"""Framework, with what ran, or what is before its comma -> the objectives that its adapter refuses."""

BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->\n"


def record(framework: str, version: str, objective: str, error: float) -> None:
    """Keep the largest error seen of one gradient entry.

    Args:
        framework: as the table names it, with what ran: "TRL, loss_type=dapo".
        version: of the framework.
        objective: its spec.
        error: the largest |framework's gradient - the direct objective's|, for advantages of about 1.
    """
    FOUND.mkdir(parents=True, exist_ok=True)
    file = FOUND / f"{framework} {version} {objective}.json".replace("/", "-")  # its own: tests run side by side
    seen = {"framework": framework, "version": version, "error": {objective: float(f"{error:.1e}")}}
    file.write_text(json.dumps(seen) + "\n")


def table(results: list[dict]) -> str:
    """The results in Markdown, the objectives of 2026 in a table of their own; columns are in the order of `error`."""
    specs = list(dict.fromkeys(spec for r in results for spec in r["error"] if spec not in OF_2026))
    recent = [r for r in results if any(spec in OF_2026 for spec in r["error"])]
    ran = [RAN.get((r["framework"], r["version"]), "no") for r in results]
    older, newer = _table(results, specs, {"ran end to end": ran}), _table(recent, OF_2026, {})
    return f"{older}\nThe objectives of 2026:\n\n{newer}"


def _table(results: list[dict], specs: Sequence[str], columns: dict[str, list[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    text = line(["framework", "version", *columns, *(f"`{s}`" for s in specs)])
    text += "|---" * (2 + len(columns) + len(specs)) + "|\n"
    for i, result in enumerate(results):
        name = result["framework"]
        refused = {*REFUSED.get(name, ()), *REFUSED.get(name.split(",")[0], ())} - set(result["error"])
        errors = [
            f"{result['error'][s]:.0e}" if s in result["error"] else "refused" if s in refused else "" for s in specs
        ]
        text += line([name, result["version"], *(column[i] for column in columns.values()), *errors])
    return text


def main() -> None:
    """Merge what the tests found into the committed figures and rewrite the page's table."""
    old = {(r["framework"], r["version"]): r for r in json.loads(FIGURES.read_text())} if FIGURES.exists() else {}
    new = [json.loads(file.read_text()) for file in sorted(FOUND.glob("*.json"))]
    for result in new:
        known = old.setdefault((result["framework"], result["version"]), result)
        known["error"] |= result["error"]
    results = [old[key] for key in sorted(old)]
    FIGURES.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + END + rest.split(END)[1])
    print(f"{len(new)} errors of this machine, {len(results)} in {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
