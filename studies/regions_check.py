"""Every claim of docs/regions.md once more, from the committed runs, by scipy alone: nothing of drpo is imported.

    python studies/regions_check.py

Of each study it reads results/STUDY.jsonl and results/STUDY.claims.toml, and compares what it finds with
results/STUDY_verdicts.json. The exit status is 1 where they differ.
"""

import json
import math
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results"
STUDIES = ("regions", "regions_more")
Ends = dict[tuple[str, str], dict[int, tuple[float, bool]]]
"""(regime, objective) -> seed -> (final score, whether it ended no higher than it began)."""


def ends_of(path: Path) -> Ends:
    """Read the finished runs."""
    found: Ends = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found.setdefault((run["regime"], run["objective"]), {})[run["seed"]] = (run["end"], run["end"] <= run["start"])
    return found


def levels(looks: Sequence[int], rate: float) -> list[float]:
    """What each look spends of the error rate (Lan and DeMets, Pocock's kind)."""
    spent = [rate * math.log(1 + (math.e - 1) * n / looks[-1]) for n in looks]
    return [b - a for a, b in zip([0.0, *spent], spent, strict=False)]


def p_values(table: dict[str, Any], a: dict[int, Any], b: dict[int, Any], seeds: Sequence[int]) -> tuple[float, float]:
    """p of no difference, and of a difference beyond the margin; 1 where the look is not complete."""
    n = len(seeds)
    if any(seed not in of for of in (a, b) for seed in seeds):
        return 1.0, 1.0
    if table["endpoint"] == "collapse":
        fell = [sum(of[seed][1] for seed in seeds) for of in (a, b)]
        if sum(fell) in (0, 2 * n):
            return 1.0, 1.0
        return float(stats.barnard_exact([fell, [n - k for k in fell]]).pvalue), 1.0
    apart = [a[seed][0] - b[seed][0] for seed in seeds]
    margin = table.get("margin")
    if margin is None:
        return float(stats.ttest_1samp(apart, 0).pvalue), 1.0
    one_sided = (
        stats.ttest_1samp(apart, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(apart, margin, alternative="less").pvalue,
    )
    return float(stats.ttest_1samp(apart, 0).pvalue), float(max(one_sided))


def rejected(p: float, others: Sequence[float], level: float) -> bool:
    """Closed testing: reject where every set of hypotheses with this one in it is rejected by Bonferroni's test.

    Of another comparison's two hypotheses at most one is true, so it stands in a set with the larger p-value. A set of
    n is rejected if its smallest p-value is at most level / n; the hardest are the sets of the largest.
    """
    ordered = sorted(others)
    return all(min([p, *ordered[k:]]) <= level / (1 + len(ordered) - k) for k in range(len(ordered) + 1))


def verdicts(table: dict[str, Any], contrasts: Sequence[dict[str, Any]], ends: Ends) -> list[str]:
    """Decide a family."""
    found = ["undecided"] * len(contrasts)
    seeds = sorted({seed for of in ends.values() for seed in of})
    pairs = [[ends.get((c["regime"], c[side]), {}) for side in ("of", "against")] for c in contrasts]
    for n, level in zip(table["seeds"], levels(table["seeds"], table["error_rate"]), strict=True):
        p = [p_values(table, a, b, seeds[:n]) for a, b in pairs]
        # Of what is decided one hypothesis is rejected; with a margin the other one is not.
        over = 0.0 if table.get("margin") is None else 1.0
        larger = [_larger(table, pair) if found[i] == "undecided" else over for i, pair in enumerate(p)]
        now = list(found)
        for i, (differs, within) in enumerate(p):
            others = larger[:i] + larger[i + 1 :]
            if found[i] != "undecided":
                continue
            if rejected(within, others, level) and table.get("margin") is not None:
                now[i] = "equivalent"
            elif rejected(differs, others, level):
                a, b = pairs[i]
                at = 1 if table["endpoint"] == "collapse" else 0
                now[i] = "above" if sum(a[s][at] - b[s][at] for s in seeds[:n]) > 0 else "below"
        found = now
    return found


def _larger(table: dict[str, Any], pair: tuple[float, float]) -> float:
    return pair[0] if table.get("margin") is None else max(pair)


def differing(study: str) -> int:
    """Return how many verdicts of a study differ, and print what each family came to."""
    committed = json.loads((RESULTS / f"{study}_verdicts.json").read_text(encoding="utf-8"))
    tables = tomllib.loads((RESULTS / f"{study}.claims.toml").read_text(encoding="utf-8"))
    ends = ends_of(RESULTS / f"{study}.jsonl")
    wrong = 0
    for name, contrasts in committed.items():
        again = verdicts(tables[name], contrasts, ends)
        for contrast, verdict in zip(contrasts, again, strict=True):
            if verdict != contrast["verdict"]:
                print(f"{name}: {contrast}, but scipy alone says {verdict}")
                wrong += 1
        decided = sum(v != "undecided" for v in again)
        print(f"{study}, {name}: {len(contrasts)} comparisons, {decided} decided, {wrong} differ")
    return wrong


def main() -> int:
    """Compare; return the exit status."""
    return int(sum(map(differing, STUDIES)) > 0)


if __name__ == "__main__":
    sys.exit(main())
