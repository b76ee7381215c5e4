"""Claims of a study: planned in claims.toml before it runs, then decided by the plan.

A *contrast* compares two objectives, in one regime or over all; the contrasts of a plan are its family.
docs/statistics.md has the rules with their sources and simulated error rates.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from drpo.errors import InputError, nearest
from drpo.lab.analysis import area, final, has_collapsed
from drpo.lab.multiple import CORRECTIONS, Verdicts, decided, look_levels
from drpo.lab.paired import TESTS, Array, barnard, blocks, equivalence, t_interval_of
from drpo.lab.statistics import Interval, rate
from drpo.lab.trial_result import Comparison, Trial
from drpo.methods import parse_objective
from drpo.objectives import REGISTRY
from drpo.spec import format_spec, runs_code

PLAN = "claims.toml"
"""File of a comparison's folder."""
END, AREA, COLLAPSE = "end", "area", "collapse"
EACH, ALL = "each", "all"
BARNARD = "barnard"
_ROUNDING = 1e-9
_CHOICES = {
    "endpoint": (END, AREA, COLLAPSE),
    "regimes": (EACH, ALL),
    "correction": tuple(CORRECTIONS),
    "test": (*TESTS, BARNARD),
}
Stratum = tuple[tuple[Any, ...], float | None]
"""A regime, and the learning rate where both objectives were trained at the same several ones."""


@dataclass(frozen=True)
class ClaimPlan:
    """The claims that a study may make, planned before it runs; a record of claims.toml.

    Args:
        endpoint: end (final score of runs that did not collapse), area (mean training reward of the same runs) or
            collapse (share of runs that collapsed).
        objectives: to make claims about.
        against: objectives to compare each with, such as none and ppo(0.2, 0.28).
        regimes: each (a comparison in every regime) or all (one over all regimes).
        seeds: number of seeds at each look, increasing; seeds are added while a comparison is undecided.
        test: t (the default in one regime), sign_flip (over all regimes) or barnard (collapse in one regime).
        error_rate: over all comparisons and looks.
        correction: holm (the chance of any false claim) or benjamini_hochberg (the share of false claims).
        margin: the largest irrelevant difference; allows claims of equivalence.
        spread: standard deviation of a seed's difference, from a pilot; for the power alone.
        collapse_below: a run with at most this score collapsed; default: its own score before training.
        after_results: the results were known when the plan was written; its claims are hypotheses.

    Raises:
        InputError: an invalid value, or values that exclude each other.
    """

    endpoint: str
    objectives: tuple[str, ...]
    against: tuple[str, ...]
    regimes: str
    seeds: tuple[int, ...]
    test: str
    error_rate: float = 0.05
    correction: str = "holm"
    margin: float | None = None
    spread: float | None = None
    collapse_below: float | None = None
    after_results: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
        if not self.pairs:
            raise InputError("objectives, against: name at least one pair of different objectives")
        look_levels(self.seeds, self.error_rate)
        if not 0 < self.error_rate < 1:
            raise InputError(f"error_rate={self.error_rate}: must be in (0, 1), such as 0.05")
        for name in ("margin", "spread"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value}: must be above 0, in the unit of the score, such as 0.05")
        if self.collapse_below is not None and not math.isfinite(self.collapse_below):
            raise InputError(f"collapse_below={self.collapse_below}: must be a finite score, such as 0.1")
        if self.correction != "holm" and (len(self.seeds) > 1 or self.margin is not None):
            raise InputError(f"correction={self.correction!r}: with several looks, or a margin, must be holm")
        self._require_test()

    def _require_test(self) -> None:
        if self.endpoint != COLLAPSE and self.test == BARNARD:
            raise InputError(f"test='barnard': compares collapse, not {self.endpoint}; must be t or sign_flip")
        if self.endpoint == COLLAPSE and (self.test == "t" or self.margin is not None):
            raise InputError("endpoint='collapse': has no margin, and its test is barnard or sign_flip")
        if self.test == BARNARD and self.regimes == ALL:
            raise InputError("test='barnard': takes runs as independent, and a seed's are not; must be sign_flip")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of objectives to compare, each pair once."""
        found: list[tuple[str, str]] = []
        for a, b in product(self.objectives, self.against):
            if a != b and (b, a) not in found and (a, b) not in found:
                found.append((a, b))
        return tuple(found)


def parse_plan(text: str, source: str = PLAN) -> ClaimPlan:
    """Parse a plan in TOML. Code that it names as `module:name` is not imported.

    Args:
        text: of claims.toml.
        source: its name, for messages.

    Raises:
        InputError: invalid TOML, or an unknown, missing or invalid field.

    Example:
        >>> plan = parse_plan('''endpoint = "end"
        ... objectives = ["drpo(0.2)", "ppo(0.2,0.28)"]
        ... against = ["none", "ppo(0.2,0.28)"]
        ... regimes = "each"
        ... seeds = [5, 10]''')
        >>> plan.pairs
        (('drpo(0.2)', 'none'), ('drpo(0.2)', 'ppo(0.2, 0.28)'), ('ppo(0.2, 0.28)', 'none'))
    """
    try:
        record = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: {error}") from None
    return plan_from(record, source)


def plan_from(record: Mapping[str, Any], source: str = PLAN) -> ClaimPlan:
    """Return the plan of a record, as `parse_plan` does: of one table of a file that names several families.

    Args:
        record: fields of `ClaimPlan`, as TOML has them.
        source: the name of the file or of the table, for messages.

    Raises:
        InputError: an unknown, missing or invalid field.

    Example:
        >>> pair = {"objectives": ["drpo(0.2)"], "against": ["none"]}
        >>> plan_from({"endpoint": "end", **pair, "regimes": "each", "seeds": [5]}).test
        't'
    """
    try:
        known = {field.name: field.default for field in fields(ClaimPlan)}
        for name in record:
            if name not in known:
                raise InputError(f"unknown field {name!r}{nearest(name, known)}")
        missing = [n for n, default in known.items() if default is MISSING and n not in record and n != "test"]
        if missing:
            raise InputError(f"{', '.join(missing)} missing; docs/statistics.md has an example")
        named = {
            n: [_spec(value) for value in msgspec.convert(record[n], list[str])] for n in ("objectives", "against")
        }
        return msgspec.convert({"test": _usual_test(record), **record, **named}, ClaimPlan)
    except (msgspec.ValidationError, InputError) as error:
        raise InputError(f"{source}: {error}") from None


def _spec(text: str) -> str:
    return text if runs_code(text) else format_spec(parse_objective(text), REGISTRY)


def _usual_test(record: Mapping[str, Any]) -> str:
    if record["endpoint"] == COLLAPSE:
        return BARNARD if record["regimes"] == EACH else "sign_flip"
    return "t" if record["regimes"] == EACH else "sign_flip"


def read_plan(path: Path) -> ClaimPlan:
    """Read a plan.

    Raises:
        InputError: the file is missing, unreadable or invalid.
    """
    try:
        return parse_plan(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def plan_of(folder: Path) -> ClaimPlan | None:
    """Return the plan in a comparison's folder, or None."""
    return read_plan(folder / PLAN) if (folder / PLAN).exists() else None


@dataclass(frozen=True)
class Contrast:
    """One comparison of the family.

    Args:
        of, against: the objectives.
        strata: the regimes to combine; a single one where the plan says "each".
    """

    of: str
    against: str
    strata: tuple[Stratum, ...]


@dataclass(frozen=True)
class Decision:
    """The decision on a contrast.

    Args:
        contrast: the comparison.
        differs: whether there is a difference; its sign is that of `difference.value`.
        equivalent: whether the difference is within the plan's margin.
        difference: mean paired difference, `of` - `against`, with Student's interval; n counts seeds.
        confidence: level of the interval: 0.95; 1 - `level` for a decision before the last look, which selects large
            differences (C. Jennison and B. W. Turnbull, JRSS B 51, 1989).
        adjusted: p-value, adjusted for the family.
        level: significance level of `adjusted` at this look.
        seeds: number of seeds; 0 before the first look is complete.
        next_seeds: number of seeds of the next look, if undecided; None after the last.
        left_out: pairs of runs left out because one collapsed.
        collapse: share of runs that collapsed, of each objective, with Clopper and Pearson's interval.
    """

    contrast: Contrast
    differs: bool
    equivalent: bool
    difference: Interval
    confidence: float
    adjusted: float
    level: float
    seeds: int
    next_seeds: int | None
    left_out: int
    collapse: tuple[Interval, Interval]

    @property
    def decided(self) -> bool:
        """Whether a difference or equivalence is claimed."""
        return self.differs or self.equivalent


def family(plan: ClaimPlan, comparison: Comparison) -> list[Contrast]:
    """Return the contrasts of a plan, in a comparison's regimes; finished or not.

    Each objective has one learning rate, chosen on other seeds; or both share several, which count as regimes.

    Raises:
        InputError: an objective that the comparison lacks, or learning rates that differ.
    """
    strata = _strata(comparison)
    found = []
    for a, b in plan.pairs:
        for name in (a, b):
            if name not in strata:
                raise InputError(f"{PLAN}: {name} is no objective of the comparison; it has {', '.join(strata)}")
        both = _common(strata[a], strata[b], f"{a} and {b}")
        if not both:
            raise InputError(f"{PLAN}: {a} and {b} have no regime in common")
        found += [Contrast(a, b, (s,)) for s in both] if plan.regimes == EACH else [Contrast(a, b, tuple(both))]
    return found


Of = dict[tuple[tuple[Any, ...], float], dict[int, Trial]]
"""(regime, learning rate) -> seed -> trial."""


def _strata(comparison: Comparison) -> dict[str, Of]:
    found: dict[str, Of] = {}
    fields_of = comparison.regime_fields
    for trial in comparison.trials:
        where = (trial.regime(fields_of), trial.learning_rate)
        found.setdefault(trial.objective, {}).setdefault(where, {})[trial.seed] = trial
    return found


def _common(a: Of, b: Of, names: str) -> list[Stratum]:
    rates = [{r for _, r in of} for of in (a, b)]
    if max(map(len, rates)) == 1:
        return list(dict.fromkeys((regime, None) for regime, _ in a if any(regime == other for other, _ in b)))
    if rates[0] != rates[1]:
        raise InputError(
            f"{PLAN}: {names} have different learning rates; choose one for each with --tuning-seeds, or give both "
            "the same"
        )
    return [stratum for stratum in a if stratum in b]


def _runs(of: Of, stratum: Stratum) -> dict[int, Trial]:
    """Return the trials of an objective in a stratum; one without a rate has a single one."""
    return next(t for (regime, r), t in of.items() if regime == stratum[0] and stratum[1] in (None, r))


def decide(plan: ClaimPlan, comparison: Comparison) -> list[Decision]:
    """Decide the contrasts of a plan from the present trials.

    Raises:
        InputError: as `family`.
    """
    strata = _strata(comparison)
    pairs_of = {
        c: [(_runs(strata[c.of], s), _runs(strata[c.against], s)) for s in c.strata] for c in family(plan, comparison)
    }
    seeds_of = {c: [_seeds(pairs, n) for n in plan.seeds] for c, pairs in pairs_of.items()}
    p = np.array([[_look(plan, pairs, seeds) for seeds in seeds_of[c]] for c, pairs in pairs_of.items()])
    differ, within = p[..., 0].T, p[..., 1].T
    levels = look_levels(plan.seeds, plan.error_rate)
    verdicts = decided(differ, within if plan.margin is not None else None, levels, plan.correction)
    return [_decision(plan, c, pairs_of[c], seeds_of[c], verdicts, i) for i, c in enumerate(pairs_of)]


Pairs = Sequence[tuple[Mapping[int, Trial], Mapping[int, Trial]]]
"""For each stratum, the trials of both objectives by seed."""


def _decision(
    plan: ClaimPlan, contrast: Contrast, pairs: Pairs, seeds_of: Sequence[list[int]], verdicts: Verdicts, i: int
) -> Decision:
    """Return the decision on the i-th contrast.

    Args:
        plan, contrast: the plan and its contrast.
        pairs: its trials.
        seeds_of: the seeds of each look; empty for an incomplete look.
        verdicts: of the family.
        i: number of the contrast.
    """
    levels, below = look_levels(plan.seeds, plan.error_rate), plan.collapse_below
    complete, ended = sum(map(bool, seeds_of)), int(verdicts.look[i]) >= 0
    look = int(verdicts.look[i]) if ended else max(0, complete - 1)
    seeds = seeds_of[look]
    confidence = 1 - levels[look] if ended and look < len(levels) - 1 else 0.95
    a, b = ([of[s] for of in side for s in seeds if s in of] for side in zip(*pairs, strict=True))
    fell = [[has_collapsed(trial, below) for trial in side] for side in (a, b)]
    return Decision(
        contrast=contrast,
        differs=bool(verdicts.differs[i]),
        equivalent=bool(verdicts.equivalent[i]),
        difference=_interval(plan, differences(plan, pairs, seeds), confidence),
        confidence=confidence,
        adjusted=float(verdicts.adjusted[i]),
        level=levels[look],
        seeds=len(seeds),
        next_seeds=None if ended or complete == len(plan.seeds) else plan.seeds[complete],
        left_out=sum(map(any, zip(*fell, strict=True))),
        collapse=(rate(fell[0]), rate(fell[1])),
    )


def _seeds(pairs: Pairs, n: int) -> list[int]:
    """Return the first n seeds; none if a run of theirs has no result, which leaves the look incomplete."""
    seeds = sorted({seed for a, b in pairs for seed in a.keys() | b.keys()})[:n]
    over = all(s in a and s in b and a[s].over and b[s].over for a, b in pairs for s in seeds if s in a or s in b)
    return seeds if over and len(seeds) == n else []


def _look(plan: ClaimPlan, pairs: Pairs, seeds: Sequence[int]) -> tuple[float, float]:
    """Return the p-values of no difference and of a difference beyond the margin; nan for an incomplete look."""
    if not seeds:
        return math.nan, math.nan
    if plan.test == BARNARD:
        ((a, b),) = pairs
        counts = [sum(has_collapsed(of[s], plan.collapse_below) for s in seeds) for of in (a, b)]
        return barnard((counts[0], counts[1]), (len(seeds), len(seeds))), 1.0
    parts, test = blocks(differences(plan, pairs, seeds)), TESTS[plan.test]
    within = 1.0 if plan.margin is None else float(equivalence(parts, plan.margin, test))
    return float(test(parts)), within


def differences(plan: ClaimPlan, pairs: Pairs, seeds: Sequence[int]) -> Array:
    """Return the paired differences of the endpoint, [R, S]; nan without a pair, or where one of its runs collapsed.

    A collapsed run counts in the rate of collapse alone.
    """

    def value(trial: Trial) -> float:
        collapsed = has_collapsed(trial, plan.collapse_below)
        if plan.endpoint == COLLAPSE:
            return float(collapsed)
        return math.nan if collapsed else final(trial) if plan.endpoint == END else area(trial)

    rows = [[_apart(value(a[s]), value(b[s])) if s in a and s in b else math.nan for s in seeds] for a, b in pairs]
    return np.array(rows, dtype=float).reshape(len(pairs), len(seeds))


def _apart(a: float, b: float) -> float:
    """Return a - b; 0 where they are equal up to rounding, which any test would find in every seed."""
    return 0.0 if math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=_ROUNDING) else a - b


def _interval(plan: ClaimPlan, apart: Array, level: float) -> Interval:
    parts = blocks(apart)
    n = int(parts.n)
    low, high = (math.nan, math.nan) if plan.endpoint == COLLAPSE else map(float, t_interval_of(parts, level))
    return Interval(float(parts.mean) if n else math.nan, low, high, n)
