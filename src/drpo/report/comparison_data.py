"""What the page of a comparison says, in words and tables: `lab.analysis` has the numbers."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from scipy.special import stdtrit

from drpo.errors import InputError
from drpo.lab.analysis import Condition, difference
from drpo.lab.grid import differing
from drpo.lab.trial_result import DIVERGED, FAILED, FINISHED, Comparison
from drpo.objectives import REGISTRY, caution
from drpo.report.comparison_table import READING, bounds, head, row
from drpo.report.panels import REWARD
from drpo.report.run_summary import machine, texts
from drpo.spec import parse_spec, runs_code
from drpo.terminal import Sheet

THRESHOLD = 0.5
"""Of the training reward, for when it was reached."""
DIFFERENCE = (
    "A cell says by how much the row's objective ends above the column's, seed by seed, with Student's 95 % interval; "
    "an interval without 0 is no claim by itself."
)
TRIAL = "A row is a run: how it ended, how many steps it has, and the fields by which the trials differ."
SHARED = "A row is a field that has one value in all trials."


def ends_table(title: str, results: Sequence[Condition], chosen: Sequence[Condition]) -> Sheet:
    """Return the conditions of a regime, the highest end first; the best rate of each objective is marked."""
    several = len({c.learning_rate for c in results}) > 1
    ordered = sorted(results, key=lambda c: -c.mean.value)
    rows = tuple((*row(c), bounds(c.iqm), "best rate" if several and c in chosen else "") for c in ordered)
    return Sheet(title, (*head(THRESHOLD), "iqm, 95 % (bootstrap)", ""), rows, READING)


def differences_table(title: str, chosen: Sequence[Condition]) -> Sheet:
    """Return by how much each objective of a regime (row) ends above each other (column), two lines a cell."""

    def trial(a: Condition, b: Condition) -> str:
        d = difference(a, b)
        return "\u2013" if a is b or d.n == 0 else f"{d.value:+.3f}\n({bounds(d)})"

    rows = tuple((a.objective, *(trial(a, b) for b in chosen)) for a in chosen)
    return Sheet(title, ("", *(f"over {b.objective}" for b in chosen)), rows, DIFFERENCE)


def seeds_sentence(n: int) -> str:
    """Say what so few seeds can show.

    Example:
        >>> seeds_sentence(3)[:101]
        "With 3 seeds Student's interval reaches 2.5 standard deviations of the seeds to each side of a mean. "
    """
    if n < 2:
        return "One seed does not say how much seeds vary: there is no interval, and nothing may be claimed."
    reach = float(stdtrit(n - 1, 0.975)) / math.sqrt(n)
    return (
        f"With {n} seeds Student's interval reaches {reach:.1f} standard deviations of the seeds to each side of a "
        "mean. No claim does not mean no difference. Where one seed in ten collapses, the interval of the mean holds "
        "less often than it says: look at the seeds themselves."
    )


def comparison_summary(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what was compared, as pairs of a name and a value."""
    configs = [texts(trial.config) for trial in comparison.trials]

    def values(name: str) -> list[str]:
        return list(dict.fromkeys(config.get(name, "-") for config in configs))

    steps, prompts, samples = (_all(values(name)) for name in ("steps", "prompts", "sampling.samples"))
    pairs = [
        ("model", _all(values("model"))),
        ("task", _all(values("task"))),
        ("objectives", _all(comparison.objectives)),
        ("seeds", _all(values("seed"))),
        ("learning rate", _all(list(dict.fromkeys(f"{c.learning_rate:g}" for c in comparison.trials)))),
        *((name.replace("_", " "), _all(values(name))) for name in comparison.regime_fields if name != "task"),
        ("each run", f"{steps} steps of {prompts} prompts, {samples} samples each"),
    ]
    return pairs + ([("machine", machine(comparison.hardware))] if comparison.hardware else [])


def _all(texts: Sequence[str]) -> str:
    return " · ".join(texts)


def counts(comparison: Comparison) -> dict[str, int]:
    """Return how many trials came to what; one that some condition has no seed for is missing."""
    statuses = Counter(trial.status for trial in comparison.trials)
    fields = comparison.regime_fields
    kinds = {(c.regime(fields), c.objective, c.learning_rate) for c in comparison.trials}
    seeds = {c.seed for c in comparison.trials}
    over = {name: statuses.pop(name, 0) for name in (FINISHED, DIVERGED, FAILED)}
    return {**over, **statuses, "missing": max(0, len(kinds) * len(seeds) - len(comparison.trials))}


def cautions(objectives: Sequence[str]) -> list[str]:
    """Return what is to be minded, with the objectives that it is true of."""
    names_of: defaultdict[str, list[str]] = defaultdict(list)
    for name in objectives:
        if runs_code(name):  # a page is made without running what its folder names
            continue
        try:
            text = caution(parse_spec(name, REGISTRY))
        except InputError:  # nothing that can be built; the page shows it as it is written
            continue
        if text is not None:
            names_of[text].append(name)
    return [f"{', '.join(names)}: {text}." for text, names in names_of.items()]


def trials_tables(comparison: Comparison, links: Sequence[str]) -> tuple[Sheet, Sheet]:
    """Return the trials by the fields that they differ by, and what all have.

    Args:
        comparison: what was read.
        links: to the report of each trial.
    """
    configs = [{k: v for k, v in texts(trial.config).items() if k != "name"} for trial in comparison.trials]
    fields = differing(configs)
    rows = tuple(
        (
            t.name,
            t.status,
            str(len(t.series[REWARD])),
            *(config.get(name, "-") for name in fields),
            t.reason or "",
            link,
        )
        for t, config, link in zip(comparison.trials, configs, links, strict=True)
    )
    head = ("trial", "status", "steps", *(name.replace("_", " ") for name in fields), "reason", "report")
    shared = tuple(pair for pair in configs[0].items() if pair[0] not in fields)
    return Sheet("", head, rows, TRIAL), Sheet("What all trials share", ("field", "value"), shared, SHARED)
