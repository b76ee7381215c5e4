"""What the exact problems show, as tables."""

import math
from collections.abc import Sequence

from drpo.terminal import Sheet
from exact.checks import Theory, checks
from exact.drift import UNBIASED
from exact.long_tail import Learnt, Noise, Training
from exact.variance import CASES

_SHOWN_DRIFTS = (0.001, 0.01, 0.05, 0.1, 0.3, 0.6)
_SHOWN_ROUNDS = (0, 1, 5, 10, 15)


def markdown(sheet: Sheet) -> str:
    """The table, without its title, as Markdown writes one.

    Example:
        >>> print(markdown(Sheet("t", ("a", "b"), (("1", "x"),))))
        | a | b |
        |---|---|
        | 1 | x |
    """
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in (sheet.head, *sheet.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(sheet.head), *lines[1:]])


def sheets(theory: Theory) -> tuple[Sheet, ...]:
    """Return the tables: checks, variance, bias, learning, and draws needed."""
    rows = tuple((c.name, c.theory, c.found, "yes" if c.agrees else "NO") for c in checks(theory))
    return (
        Sheet("What was checked", ("check", "theory", "found", "agrees"), rows),
        _variance(theory),
        _bias(theory),
        _learning("The tail is noise: true value (best possible 0.6)", theory.noisy, 0.58),
        _learning("The tail holds the best word: value (best possible 1)", theory.meaningful, 0.9),
        _staleness(theory),
        _draws("The tail is noise, the policy believes one batch", theory.noisy_noise),
        _draws("The best word rises", theory.meaningful_noise),
    )


def _variance(theory: Theory) -> Sheet:
    names = list(dict.fromkeys(v.objective for v in theory.variances))
    found = {(v.objective, v.case): v.exponent for v in theory.variances}

    def cell(exponent: float | None) -> str:
        return "silenced" if exponent is None else f"{exponent:.1f}"

    rows = tuple((name, *(cell(found[name, case]) for case in CASES)) for name in names)
    return Sheet("Exponent k of variance ~ mu^k as mu -> 0", ("objective", *CASES), rows)


def _bias(theory: Theory) -> Sheet:
    def cell(relative: float) -> str:
        return "0" if relative < UNBIASED else f"{relative:.2g}"

    rows = []
    for d in theory.drift:
        at = dict(zip(d.tv, d.relative, strict=True))
        grows = "jumps" if d.order is not None and d.order < 0.01 else "" if d.order is None else f"tv^{d.order:.1f}"
        rows.append((d.objective, cell(at[0.0]), *(cell(at[tv]) for tv in _SHOWN_DRIFTS), grows))
    head = ("objective", "tv 0", *(f"tv {tv:g}" for tv in _SHOWN_DRIFTS), "at first")
    return Sheet("Relative bias of the expected gradient", head, tuple(rows))


def _learning(title: str, learnt: Sequence[Learnt], level: float) -> Sheet:
    rounds = [r for r in _SHOWN_ROUNDS if r < len(learnt[0].value)]
    rows = []
    for result in learnt:
        reached = result.reached(level)
        values = (f"{result.value[r]:.3f}" for r in rounds)
        rows.append((result.objective, *values, "never" if reached is None else str(reached)))
    return Sheet(title, ("objective", *(f"round {r}" for r in rounds), f"reaches {level:g} in round"), tuple(rows))


def _staleness(theory: Theory) -> Sheet:
    columns = {c.updates: {result.objective: result.value[-1] for result in c.learnt} for c in theory.noisy_staleness}
    columns[Training().updates] = {result.objective: result.value[-1] for result in theory.noisy}
    names = [result.objective for result in theory.noisy_staleness[0].learnt]
    rows = tuple((name, *(f"{column[name]:.3f}" for column in columns.values())) for name in names)
    head = ("objective", *(f"{updates} updates" for updates in columns))
    return Sheet("The tail is noise: true value after 15 rollouts, by updates on each", head, rows)


def _draws(title: str, noise: Sequence[Noise]) -> Sheet:
    tvs = list(dict.fromkeys(n.tv for n in noise))
    names = list(dict.fromkeys(n.objective for n in noise))
    at = {(n.objective, n.tv): n for n in noise}

    def cell(n: Noise) -> str:
        return f"{n.draws:.3g} (cos {n.cosine:.2f})" if math.isfinite(n.draws) else f"leads away (cos {n.cosine:.2f})"

    rows = tuple((name, *(cell(at[name, tv]) for tv in tvs)) for name in names)
    return Sheet(
        f"{title}: draws for a signal as large as the noise", ("objective", *(f"tv {tv:g}" for tv in tvs)), rows
    )
