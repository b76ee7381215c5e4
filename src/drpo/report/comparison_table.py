"""A comparison on the terminal: a table per regime, and what may be claimed."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import median

from rich.console import Console

from drpo.lab.analysis import Condition, best, claims, conditions, label
from drpo.lab.statistics import Interval
from drpo.lab.trial_result import Comparison
from drpo.terminal import Sheet, as_table


def print_comparison(console: Console, comparison: Comparison, threshold: float = 0.5, best_only: bool = False) -> None:
    """Print, for each regime, how every objective did, then the claims that the seeds allow.

    Args:
        console: where to.
        comparison: with at least one result.
        threshold: of the training reward, for the column that says when it was reached.
        best_only: leave out all learning rates of an objective but its best.
    """
    results = conditions(comparison, threshold)
    shown, fields, chosen = best(results) if best_only else results, comparison.regime_fields, best(results)
    for regime in dict.fromkeys(c.regime for c in shown):
        here = [c for c in shown if c.regime == regime]
        sheet = Sheet(label(regime, fields), head(threshold), tuple(map(row, here)))
        marked = {i for i, c in enumerate(here) if c in chosen} if len(chosen) < len(shown) else ()
        console.print(as_table(sheet, bold=marked))
    for line in claim_lines(results, fields):
        console.print(line, highlight=False, soft_wrap=True)


def head(threshold: float) -> tuple[str, ...]:
    """Return what stands above the columns of `row`."""
    means = ("end", "95 % (t)", "iqm", "area")
    return ("objective", "learning rate", "seeds", *means, f"reached {threshold:g}", "collapsed")


def row(c: Condition) -> tuple[str, ...]:
    """Write what came of a condition."""
    means = (f"{c.mean.value:.3f}", bounds(c.mean), f"{c.iqm.value:.3f}", f"{c.area.value:.3f}")
    return (c.objective, f"{c.learning_rate:g}", str(c.mean.n), *means, reached(c), collapse(c))


def bounds(interval: Interval) -> str:
    """Write an interval's bounds, or that there are none.

    Example:
        >>> bounds(Interval(0.5, 0.25, 0.75, 3)), bounds(Interval(0.5, float("nan"), float("nan"), 1))
        ('0.25 to 0.75', 'one seed')
    """
    return "one seed" if math.isnan(interval.low) else f"{interval.low:.2f} to {interval.high:.2f}"


def reached(c: Condition) -> str:
    """Write how many seeds reached the threshold, and at which step the median of them did."""
    steps = [step for step in c.reached.values() if step is not None]
    return f"{len(steps)}/{len(c.reached)}" + (f" at {median(steps):.0f}" if steps else "")


def collapse(c: Condition) -> str:
    """Write how many seeds collapsed, and how many of these diverged."""
    fallen = round(c.collapse.value * c.collapse.n)
    return f"{fallen}/{c.collapse.n}" + (f", {c.n_diverged} diverged" if c.n_diverged else "")


def claim_lines(results: Sequence[Condition], fields: Sequence[str]) -> Iterator[str]:
    """Yield what may be claimed, a line each, then of how many pairs; where nothing may be, a line that says so."""
    chosen = best(results)
    made = list(claims(chosen))
    for claim in made:
        where = f" ({label(claim.regime, fields)})" if fields else ""
        yield (
            f"{claim.better} ends above {claim.worse}{where}: intervals are disjoint; seed by seed by "
            f"{claim.difference.value:.3f}, {bounds(claim.difference)}"
        )
    if made:
        pairs = sum(a.regime == b.regime for a, b in combinations(chosen, 2))
        yield f"of {pairs} pairs that were compared, {len(made)}: among many, some intervals part by chance"
    elif len(results) > 1:
        yield "no claim: all intervals overlap, or there are too few seeds for any"
