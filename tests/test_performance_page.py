"""The figures of docs/performance.md that the benchmarks' committed results have too are the same."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmarks import page
from benchmarks.rounds import column, ratios, summary
from benchmarks.table import PARTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core-epyc-avx512bf16.json"
CASES: dict[str, Any] = {f"{c['part']}: {c['name']}": c for c in json.loads(RESULTS.read_text())["cases"]}
PAGE = (ROOT / "docs" / "performance.md").read_text()
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")

STEPS = {
    "bf16, all rows to 32 tokens": "bf16, full length, hash reward",
    "bf16, rows end where they end": "bf16, natural length, hash reward",
    "bf16, rows end where they end, the task's own reward (groups of equal rewards are skipped; 2 rounds)": (
        "bf16, natural length, exact reward"
    ),
    "fp32, all rows to 32 tokens": "fp32, full length, hash reward",
}
ROLLOUTS = {**{f"{n}": f"{n} rows x 32 tokens" for n in (1, 16, 64, 256)}, "64, of 256 tokens each (one round)": (
    "64 rows x 256 tokens"
)}  # fmt: skip
HEADS = {
    "`linear_policy_loss`": "linear_policy_loss",
    "`linear_logprob` (four products)": "linear_logprob",
    "log_softmax and gather": "log_softmax",
    "Liger's fused GRPO loss": "Liger GRPO",
}
TRL = "TRL, 16 x 4"


def table(head: str) -> dict[str, list[str]]:
    """The table whose first line begins so: first cell of a row -> the others."""
    _, _, behind = PAGE.partition(head)
    lines = [line for line in behind.split("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def floors(case: Any) -> list[float]:
    """Ours with a prompt once a group and once a sample, then TRL's."""
    of = {row[1]: row[11].split(" / ") for row in PARTS["step"][3](case)}
    return [float(of[who][which]) for who in ("drpo", TRL) for which in (1, 0)]


def rates(case: Any, who: str) -> list[float]:
    found = zip(column(case["rounds"], who, "tokens"), column(case["rounds"], who, "seconds"), strict=True)
    return [tokens / seconds for tokens, seconds in found]


def pairs() -> Iterator[tuple[str, str, Sequence[float]]]:
    """Where a cell stands, the cell, and what its numbers are: a median, then perhaps the least and the greatest."""
    for label, (ours, theirs, ratio, floor) in table("| | this project | TRL | ratio |").items():
        case = CASES[f"step: {STEPS[label]}"]
        seconds = {who: summary(column(case["rounds"], who, "seconds")) for who in ("drpo", TRL)}
        yield f"{label}: ours", ours, seconds["drpo"]
        yield f"{label}: TRL", theirs, seconds[TRL]
        yield f"{label}: ratio", ratio, summary(ratios(case["rounds"], TRL, "drpo"))
        if floor:
            yield f"{label}: floor", floor, floors(case)
    for label, cells in table("| rows | this project |").items():
        case = CASES[f"rollout: {ROLLOUTS[label]}"]
        for who, cell in zip(("drpo", "transformers", "vLLM"), cells, strict=True):
            yield f"{label} rows: {who}", cell, summary(rates(case, who))
    for label, cells in table("| | bf16 | fp32 |").items():
        for dtype, cell in zip(("bf16", "fp32"), cells[:2], strict=True):  # memory is less what is returned
            case = CASES[f"head: {dtype}, V 49,152, H 576, T 2,048"]
            yield f"{label}: {dtype}", cell, summary(ratios(case["rounds"], HEADS[label], "products alone"))


def agree(cell: str, wanted: Sequence[float]) -> bool:
    """Each number of a cell is the wanted one, rounded to as many decimals."""
    for shown, value in zip(NUMBER.findall(cell), wanted, strict=False):
        decimals = len(shown.partition(".")[2])
        if abs(float(shown.replace(",", "")) - value) > 0.51 * 10**-decimals:
            return False
    return bool(NUMBER.search(cell))


PAIRS = list(pairs())


def test_all_rows_are_compared():
    assert len(PAIRS) == 4 * 3 + 2 + 5 * 3 + 4 * 2


@pytest.mark.parametrize(("cell", "wanted"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_a_figure_is_what_was_measured(cell: str, wanted: Sequence[float]):
    assert agree(cell, wanted), f"{cell} is not {wanted}"


def test_a_wrong_figure_is_noticed():
    assert not agree("4.2x (4.0 to 5.3)", [4.22, 4.06, 5.23]) and agree("4.2x (4.1 to 5.2)", [4.22, 4.06, 5.23])


def test_the_page_of_dynamic_sampling_has_the_figures_that_were_measured():
    measured = json.loads((RESULTS.parent / "cpu-2core-epyc-avx2.json").read_text())["cases"]
    wanted = [row[2:7] for case in measured if case["part"] == "resampling" for row in PARTS["resampling"][3](case)]
    page = (ROOT / "docs" / "methods.md").read_text()
    lines = page.partition("| task | | groups with a signal")[2].split("\n\n")[0].splitlines()[2:]
    assert [[cell.removesuffix(" %") for cell in line.strip("| ").split(" | ")][-5:] for line in lines] == wanted


def test_the_table_of_all_machines_is_what_their_results_say():
    assert page.filled(PAGE) == PAGE, "run python -m benchmarks.page"
    machines = page.committed()
    assert len(machines) > 1 and all(page._heading(results["machine"]) in PAGE for results in machines)
    written_by_hand = PAGE.replace(" rounds |", " round |")
    assert page.filled(written_by_hand) != written_by_hand
