"""Simulates the rules of docs/statistics.md for claims: false claims, power and coverage, the old rule beside them.

    python studies/claim_rates.py

A simulated study has six objectives; each of the other four and PPO is compared with no region, and the four with PPO:
nine comparisons. A run ends at a level, plus what its seed brings to all objectives in its regime, plus what its seed
brings to its objective in all regimes, plus noise; all in standard deviations of the noise. Results go to
results/claim_rates.json; `python studies/figures.py` puts the tables into the page. Minutes on one core.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from drpo.lab.multiple import decided, look_levels
from drpo.lab.paired import TESTS, Array, Blocks, barnard, blocks, equivalence, t_interval_of
from drpo.train.records import read_json
from markdown_tables import markdown

RESULTS = Path(__file__).resolve().parent / "results" / "claim_rates.json"
OBJECTIVES = 6
PAIRS = ((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (2, 1), (3, 1), (4, 1), (5, 1))
"""No region is 0, PPO 1."""
ALL_PAIRS = tuple((a, b) for b in range(OBJECTIVES) for a in range(b + 1, OBJECTIVES))
ERROR_RATE = 0.05
SHARED = 0.7
"""Standard deviation of what a seed brings to one objective in all regimes, beside noise of 1."""

NOISE: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "heavy": lambda generator, shape: generator.standard_t(3, size=shape) / np.sqrt(3.0),
    "skewed": lambda generator, shape: (generator.lognormal(size=shape) - np.exp(0.5)) / np.sqrt(np.e * (np.e - 1)),
}
"""Noise of a run, mean 0 and standard deviation 1: normal, Student's t with 3 degrees of freedom, or log-normal."""


@dataclass(frozen=True)
class Study:
    """A kind of simulated study.

    Args:
        seeds: of each objective in each regime.
        regimes: with the same seeds.
        noise: of `NOISE`.
        collapse: chance that a run collapses, of each objective.
        level: where the runs of each objective end that do not collapse.
    """

    seeds: int
    regimes: int = 1
    noise: str = "normal"
    collapse: tuple[float, ...] = (0.0,) * OBJECTIVES
    level: tuple[float, ...] = (0.0,) * OBJECTIVES


COLLAPSED = -8.0
"""Where a run ends that collapsed."""


def draw(study: Study, generator: np.random.Generator, repeats: int) -> tuple[Array, Array]:
    """Return the final scores of simulated studies, and which runs collapsed, [repeats, objectives, regimes, seeds]."""
    shape = (repeats, OBJECTIVES, study.regimes, study.seeds)
    of_seed = generator.normal(size=(repeats, 1, study.regimes, study.seeds))
    of_both = SHARED * generator.normal(size=(repeats, OBJECTIVES, 1, study.seeds))
    level = np.array(study.level)[:, None, None]
    ends = level + of_seed + of_both + NOISE[study.noise](generator, shape)
    fallen = generator.random(shape) < np.array(study.collapse)[:, None, None]
    return np.where(fallen, COLLAPSED + 0.1 * ends, ends), fallen


def apart(ends: Array, fallen: Array) -> Array:
    """Return the differences of `PAIRS`, [repeats, pairs, regimes, seeds]; nan where a run of a pair collapsed."""
    kept = np.where(fallen, np.nan, ends)
    return np.stack([kept[:, a] - kept[:, b] for a, b in PAIRS], 1)


def truths(study: Study) -> Array:
    """Return the true differences of `PAIRS`."""
    return np.array([study.level[a] - study.level[b] for a, b in PAIRS])


def family_parts(differences: Array, each: bool) -> Blocks:
    """Return the blocks of a family: pairs in every regime, or over all; [repeats, comparisons, seeds]."""
    if not each:
        return blocks(differences)
    repeats, pairs, regimes, seeds = differences.shape
    return blocks(differences.reshape(repeats, pairs * regimes, 1, seeds))


def share(flags: Any) -> float:
    """Return a share, rounded."""
    return round(float(np.mean(flags)), 4)


def new_rule(study: Study, test: str, each: bool, seed: int, repeats: int) -> dict[str, float]:
    """Return what the new rule does to a kind of study: false claims, true ones, and coverage.

    Args:
        study: the kind.
        test: of `TESTS`.
        each: a comparison in every regime, or one over all.
        seed: of the simulation.
        repeats: simulated studies.
    """
    ends, fallen = draw(study, np.random.default_rng(seed), repeats)
    parts = family_parts(apart(ends, fallen), each)
    truth = np.repeat(truths(study), study.regimes if each else 1)
    verdicts = decided(TESTS[test](parts)[None], None, (ERROR_RATE,))
    return {**_claims(verdicts.differs, parts.mean, truth), "coverage": _coverage(parts, truth)}


def _claims(differs: Array, mean: Array, truth: Array) -> dict[str, float]:
    wrong = differs & np.where(truth == 0, True, np.sign(mean) != np.sign(truth))
    real = truth != 0
    return {"false": share(wrong.any(-1)), "power": share((differs & ~wrong)[..., real]) if real.any() else 0.0}


def _coverage(parts: Blocks, truth: Array) -> float:
    low, high = t_interval_of(parts)
    known = parts.n > 1
    return share(np.asarray((low <= truth) & (truth <= high))[known])


def old_rule(study: Study, each: bool, seed: int, repeats: int) -> dict[str, float]:
    """Return the same of the rule before: disjoint Student intervals of means, of all pairs.

    Its means have collapsed runs in them, so what is true of these is what is true of all runs. Over regimes it took
    the seeds of different regimes as independent (`drpo.lab.statistics.t_interval`).
    """
    ends, _ = draw(study, np.random.default_rng(seed), repeats)
    mean, variance = ends.mean(-1), ends.var(-1, ddof=1) / study.seeds
    freedom = np.full(mean.shape, study.seeds - 1.0)
    if not each:
        shares = variance / variance.sum(-1, keepdims=True)
        freedom = freedom[..., :1] / (shares**2).sum(-1, keepdims=True)
        mean, variance = mean.mean(-1, keepdims=True), variance.mean(-1, keepdims=True) / study.regimes
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    level = np.array(study.level) + np.array(study.collapse) * (COLLAPSED - 0.9 * np.array(study.level))  # of all runs
    apart_by = np.stack([mean[:, a] - mean[:, b] for a, b in ALL_PAIRS], 1)
    claimed = np.abs(apart_by) > np.stack([half[:, a] + half[:, b] for a, b in ALL_PAIRS], 1)
    true = np.array([level[a] - level[b] for a, b in ALL_PAIRS])[:, None]
    wrong = claimed & ((true == 0) | (np.sign(apart_by) != np.sign(true)))
    real = np.broadcast_to(true != 0, claimed.shape)
    return {
        "false": share(wrong.any((1, 2))),
        "power": share((claimed & ~wrong)[real]) if real.any() else 0.0,
        "coverage": share(np.abs(mean - level[:, None]) <= half),
    }


def looks_rule(study: Study, looks: Sequence[int], seed: int, repeats: int) -> dict[str, float]:
    """Return what adding seeds where a comparison is undecided does: as `new_rule`, and the mean number of seeds."""
    ends, fallen = draw(study, np.random.default_rng(seed), repeats)
    differences, truth = apart(ends, fallen), np.repeat(truths(study), study.regimes)
    parts = [family_parts(differences[..., :n], each=True) for n in looks]
    p = np.stack([TESTS["t"](part) for part in parts])
    levels = look_levels(looks, ERROR_RATE)
    verdicts = decided(p, None, levels)
    last = np.where(verdicts.look < 0, len(looks) - 1, verdicts.look)
    confidence = (*(1 - level for level in levels[:-1]), 0.95)
    mean = np.take_along_axis(np.stack([part.mean for part in parts]), last[None], 0)[0]
    bounds = [np.stack(side) for side in zip(*map(t_interval_of, parts, confidence), strict=True)]
    low, high = (np.take_along_axis(side, last[None], 0)[0] for side in bounds)
    used = np.array(looks)[last]
    return {
        **_claims(verdicts.differs, mean, truth),
        "coverage": share((low <= truth) & (truth <= high)),
        "seeds": round(float(used.mean()), 2),
    }


def equivalence_rule(study: Study, margin: float, seed: int, repeats: int) -> dict[str, float]:
    """Return false claims of difference or equivalence at one error rate, and how often equivalence is found."""
    ends, fallen = draw(study, np.random.default_rng(seed), repeats)
    parts, truth = family_parts(apart(ends, fallen), each=True), np.repeat(truths(study), study.regimes)
    p, within = TESTS["t"](parts)[None], equivalence(parts, margin)[None]
    verdicts = decided(p, within, (ERROR_RATE,))
    wrong = verdicts.differs & ((truth == 0) | (np.sign(parts.mean) != np.sign(truth)))
    wrong |= verdicts.equivalent & (np.abs(truth) >= margin)
    inside = np.abs(truth) < margin
    return {
        "false": share(wrong.any(-1)),
        "found": share(verdicts.equivalent[..., inside]) if inside.any() else 0.0,
    }


def collapse_rule(study: Study, each: bool, seed: int, repeats: int) -> dict[str, float]:
    """Return what the tests of collapse do: Barnard's in each regime, sign flips over all."""
    _, fallen = draw(study, np.random.default_rng(seed), repeats)
    if each:
        counts, n = fallen.sum(-1), study.seeds
        pairs = np.stack([np.stack([counts[:, a], counts[:, b]], -1) for a, b in PAIRS], 1).reshape(repeats, -1, 2)
        p = np.array([[barnard((int(k), int(other)), (n, n)) for k, other in row] for row in pairs])
    else:
        flags = fallen.astype(float)
        p = TESTS["sign_flip"](blocks(np.stack([flags[:, a] - flags[:, b] for a, b in PAIRS], 1)))
    chance = np.array([study.collapse[a] - study.collapse[b] for a, b in PAIRS])
    truth = np.repeat(chance, study.regimes if each else 1)
    differs = decided(p[None], None, (ERROR_RATE,)).differs
    real = truth != 0
    return {"false": share((differs & ~real).any(-1)), "power": share(differs[..., real]) if real.any() else 0.0}


COLLAPSES = (0.0, 0.0, 0.3, 0.3, 0.3, 0.3)
EVEN = (0.2,) * OBJECTIVES
STEPPED = (0.0, 0.0, 0.0, 2.5, 2.5, 2.5)
"""Half the objectives are better by 2.5 standard deviations of the noise."""
NULLS: Mapping[str, Mapping[str, Any]] = {
    "normal": {},
    "heavy tails": {"noise": "heavy"},
    "skewed": {"noise": "skewed"},
    "one in five collapses": {"collapse": EVEN},
    "some collapse, others do not": {"collapse": COLLAPSES},
    "heavy tails, some collapse": {"noise": "heavy", "collapse": COLLAPSES},
}
"""Kinds of studies; in each, no objective differs, or half do (`STEPPED`)."""


MANY = (5, 10, 20)
"""Seeds at the looks."""


def simulate(repeats: int = 10_000) -> dict[str, Any]:
    """Simulate everything.

    Args:
        repeats: simulated studies of each kind; of those over several regimes half as many.
    """
    found: dict[str, Any] = {"repeats": repeats}
    for name, kind in NULLS.items():
        for truth, level in (("none differ", (0.0,) * OBJECTIVES), ("half differ", STEPPED)):
            found.setdefault(name, {})[truth] = _rules(kind, level, repeats)
        at_margin = Study(10, level=(0.0, 1.0, 1.0, 1.0, 1.0, 0.0), **kind)
        found[name]["equivalence"] = {
            "at the margin": equivalence_rule(at_margin, 1.0, 4, repeats),
            "none differ": equivalence_rule(Study(20, **kind), 2.0, 4, repeats),
        }
    for name, chance in (("even", EVEN), ("uneven", (0.0, 0.0, 0.0, 0.6, 0.6, 0.6))):
        of_kind = found.setdefault("collapse", {}).setdefault(name, {})
        for n in (5, 10, 20):
            of_kind[f"one, {n}"] = collapse_rule(Study(n, collapse=chance), True, 5, repeats)
        of_kind["all of 4, 10"] = collapse_rule(Study(10, regimes=4, collapse=chance), False, 6, repeats // 2)
    return found


def _rules(kind: Mapping[str, Any], level: tuple[float, ...], repeats: int) -> dict[str, dict[str, float]]:
    """Return what every rule does to a kind of study."""
    found = {}
    for n in (3, 5, 10):
        study = Study(n, level=level, **kind)
        found[f"old {n}"] = old_rule(study, True, n, repeats)
        found[f"t {n}"] = new_rule(study, "t", True, n, repeats)
        over = Study(n, regimes=4, level=level, **kind)
        found[f"old over {n}"] = old_rule(over, False, n, repeats // 2)
        found[f"t over {n}"] = new_rule(over, "t", False, n, repeats // 2)
    found["flips over 10"] = new_rule(Study(10, regimes=4, level=level, **kind), "sign_flip", False, 10, repeats // 2)
    found["t each of 4"] = new_rule(Study(5, regimes=4, level=level, **kind), "t", True, 1, repeats // 2)
    found["t looks"] = looks_rule(Study(MANY[-1], level=level, **kind), MANY, 3, repeats)
    return found


WITHIN: Mapping[str, str] = {
    "old 3": "old rule, 3 seeds",
    "t 3": "t, 3",
    "old 5": "old, 5",
    "t 5": "t, 5",
    "old 10": "old, 10",
    "t 10": "t, 10",
    "t each of 4": "t, 5, in each of 4 regimes",
    "t looks": "t, looks at 5, 10, 20",
}
OVER: Mapping[str, str] = {
    "old over 3": "old rule, 3 seeds",
    "t over 3": "t, 3",
    "old over 10": "old, 10",
    "t over 10": "t, 10",
    "flips over 10": "sign flips, 10",
}
TRUTHS = ("none differ", "half differ")


def table(figure: str, rules: Mapping[str, str], truths_of: Sequence[str] = TRUTHS) -> str:
    """Return a table of the page: of each kind of study, one figure of every rule, in %.

    Args:
        figure: false, power or coverage.
        rules: `WITHIN` a regime, or `OVER` four.
        truths_of: of the kinds to show.
    """
    found = read_json(RESULTS)
    rows = [
        [f"{kind}, {truth}", *(f"{100 * found[kind][truth][name][figure]:.1f}" for name in rules)]
        for kind in NULLS
        for truth in truths_of
    ]
    return markdown(["runs, objectives", *rules.values()], rows)


def seeds_table() -> str:
    """Return how many seeds of 20 the looks took."""
    found = read_json(RESULTS)
    rows = [[kind, *(f"{found[kind][truth]['t looks']['seeds']:.1f}" for truth in TRUTHS)] for kind in NULLS]
    return markdown(["runs", *TRUTHS], rows)


def equivalence_table() -> str:
    """Return what is claimed at the margin, and how often equivalence is found where nothing differs."""
    found = read_json(RESULTS)
    rows = [
        [
            kind,
            f"{100 * found[kind]['equivalence']['at the margin']['false']:.1f}",
            f"{100 * found[kind]['equivalence']['none differ']['found']:.1f}",
        ]
        for kind in NULLS
    ]
    return markdown(["runs", "false, true difference at the margin, 10 seeds", "found, no difference, 20 seeds"], rows)


def collapse_table() -> str:
    """Return what the tests of collapse claim: where all collapse alike, and where some do more often."""
    found = read_json(RESULTS)["collapse"]
    rows = [
        [name, f"{100 * found['even'][name]['false']:.1f}", f"{100 * found['uneven'][name]['power']:.1f}"]
        for name in found["even"]
    ]
    return markdown(["regimes, runs of each", "false, one in five collapses", "found, 0 % against 60 %"], rows)


def main() -> int:
    """Simulate, write the results, and print them."""
    found = simulate()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
