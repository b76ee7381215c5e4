"""The table framework x version x objective -> largest error of a gradient, made by the tests of the adapters.

Tests call `record`; `python -m tests.adapters.parity` puts what they found into docs/parity.json and the table of
docs/frameworks.md.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".adapters" / "parity"
FIGURES = ROOT / "docs" / "parity.json"
PAGE = ROOT / "docs" / "frameworks.md"
RAN = {("TRL, loss_type=dr_grpo", "1.16.0"): "[yes, on a CPU](../cluster/trl/README.md)"}
"""Framework and version, as the table names them -> the page that tells of a run by the framework's own trainer, from a
command line to its last step and a checkpoint that `drpo eval` reads. What is not here has not."""

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
    file = FOUND / f"{framework} {version}.json".replace("/", "-")
    seen = json.loads(file.read_text()) if file.exists() else {"framework": framework, "version": version, "error": {}}
    seen["error"][objective] = float(f"{error:.1e}")
    file.write_text(json.dumps(seen, indent=1) + "\n")


def table(results: list[dict]) -> str:
    """The results in Markdown; columns are objectives, in the order of their first appearance."""
    specs = list(dict.fromkeys(spec for r in results for spec in r["error"]))
    lines = ["| framework | version | ran end to end | " + " | ".join(f"`{s}`" for s in specs) + " |"]
    lines.append("|---" * (3 + len(specs)) + "|")
    for result in results:
        errors = [f"{result['error'][s]:.0e}" if s in result["error"] else "" for s in specs]
        ran = RAN.get((result["framework"], result["version"]), "no")
        lines.append(f"| {result['framework']} | {result['version']} | {ran} | " + " | ".join(errors) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Merge what the tests found into the committed figures and rewrite the page's table."""
    old = {(r["framework"], r["version"]): r for r in json.loads(FIGURES.read_text())} if FIGURES.exists() else {}
    new = [json.loads(file.read_text()) for file in sorted(FOUND.glob("*.json"))]
    merged = old | {(r["framework"], r["version"]): r for r in new}
    results = [merged[key] for key in sorted(merged)]
    FIGURES.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(results) + END + rest.split(END)[1])
    print(f"{len(new)} results of this machine, {len(results)} in {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
