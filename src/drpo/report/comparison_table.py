"""A comparison on the terminal: a table per regime, and what may be claimed."""

import math
from collections.abc import Iterator
from statistics import median

from rich.console import Console

from drpo.errors import counted
from drpo.lab.analysis import Condition, best, conditions, label
from drpo.lab.claims import COLLAPSE, EACH, PLAN, ClaimPlan, Decision, decide
from drpo.lab.statistics import Interval
from drpo.lab.trial_result import Comparison
from drpo.terminal import Sheet, as_table

READING = (
    "A row is an objective over its seeds: end, the final reward (mean, 95 % interval, mean of the middle half); area, "
    "the mean training reward; reached, how many seeds got that far and at which step; collapsed, how many ended no "
    "higher than they began."
)
UNNAMED = f"no {PLAN}: nothing was named in advance, so nothing is claimed; the tables describe these runs"


def print_comparison(
    console: Console,
    comparison: Comparison,
    plan: ClaimPlan | None = None,
    threshold: float = 0.5,
    best_only: bool = False,
) -> None:
    """Print, for each regime, how every objective did, then what may be claimed.

    Args:
        console: where to.
        comparison: with at least one result.
        plan: what was named in advance.
        threshold: of the training reward, for the column that says when it was reached.
        best_only: leave out all learning rates of an objective but its best.
    """
    results = conditions(comparison, threshold)
    shown, fields, chosen = best(results) if best_only else results, comparison.regime_fields, best(results)
    for regime in dict.fromkeys(c.regime for c in shown):
        here = [c for c in shown if c.regime == regime]
        sheet = Sheet(label(regime, fields), head(threshold), tuple(map(row, here)), READING)
        marked = {i for i, c in enumerate(here) if c in chosen} if len(chosen) < len(shown) else ()
        console.print(as_table(sheet, bold=marked))
    for line in claim_lines(plan, comparison):
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


def claim_lines(plan: ClaimPlan | None, comparison: Comparison) -> Iterator[str]:
    """Yield what was named in advance, then what every comparison of it came to, a line each; what is decided first."""
    if plan is None:
        if len(comparison.objectives) > 1:
            yield UNNAMED
        return
    decisions = decide(plan, comparison)
    yield plan_line(plan, len(decisions), sum(d.decided for d in decisions))
    for decision in sorted(decisions, key=lambda d: not d.decided):
        yield decision_line(plan, decision, comparison.regime_fields)


def plan_line(plan: ClaimPlan, n: int, n_decided: int) -> str:
    """Write what a plan promises, and what it came to."""
    rule = "chance of any false claim" if plan.correction == "holm" else "expected share of false claims"
    after = "after the results were known: hypotheses for new seeds, no claims" if plan.after_results else "in advance"
    return f"{n_decided} of {counted(n, 'comparison')} decided, {rule} at most {plan.error_rate:.0%}; named {after}"


def decision_line(plan: ClaimPlan, d: Decision, fields: tuple[str, ...]) -> str:
    """Write what a comparison came to, with its size and what it was decided by."""
    what = _above(plan, d) if d.differs else f"is equivalent to {d.contrast.against}"
    who = f"{d.contrast.of} {what}" if d.decided else f"undecided: {d.contrast.of} and {d.contrast.against}"
    if d.differs and d.equivalent:
        who += f", by less than {plan.margin:g}"
    if not d.decided and d.seeds == 0:
        return f"{who}{_where(plan, d, fields)}: not {plan.seeds[0]} seeds of each have a result yet"
    more = f"; the next look is at {d.next_seeds} seeds" if d.next_seeds else ""
    return f"{who}{_where(plan, d, fields)}: {_size(plan, d)}; {_collapses(d)}{more}"


def _above(plan: ClaimPlan, d: Decision) -> str:
    up = d.difference.value > 0
    if plan.endpoint == COLLAPSE:
        return f"collapses {'more' if up else 'less'} often than {d.contrast.against}"
    name = "ends" if plan.endpoint == "end" else "learns with a mean reward"
    return f"{name} {'above' if up else 'below'} {d.contrast.against}"


def _where(plan: ClaimPlan, d: Decision, fields: tuple[str, ...]) -> str:
    if plan.regimes != EACH:
        return f" over {counted(len(d.contrast.strata), 'regime')}"
    ((regime, rate),) = d.contrast.strata
    parts = [*([label(regime, fields)] if fields else []), *([f"learning rate {rate:g}"] if rate is not None else [])]
    return f" ({', '.join(parts)})" if parts else ""


def _size(plan: ClaimPlan, d: Decision) -> str:
    p = f"adjusted p {d.adjusted:.2g} at {d.level:.2g}, {counted(d.seeds, 'seed')}"
    if plan.endpoint == COLLAPSE:
        return p
    if d.difference.n == 0:
        return "in every pair one collapsed"
    return f"{d.difference.value:+.3f}, {d.confidence:.0%} {bounds(d.difference)}; {p}"


def _collapses(d: Decision) -> str:
    counts = [f"{round(rate.value * rate.n)} of {rate.n} ({bounds(rate)})" for rate in d.collapse]
    return f"collapsed {' and '.join(counts)}"
