"""What the exact problems show, as tables."""

import math
from collections.abc import Sequence

from drpo.terminal import Sheet
from exact.checks import Theory, checks
from exact.drift import UNBIASED, Drift
from exact.fates import MU
from exact.long_tail import Learnt, Noise, Training
from exact.variance import CASES, Variance

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
    """Return the tables: checks, variance, bias, of 2026 too, learning, draws needed, and how far DRPO parts."""
    rows = tuple((c.name, c.theory, c.found, "yes" if c.agrees else "NO") for c in checks(theory))
    return (
        Sheet("What was checked", ("check", "theory", "found", "agrees"), rows),
        _variance("Exponent k of variance ~ mu^k as mu -> 0", theory.variances),
        _bias("Relative bias of the expected gradient", theory.drift),
        _learning("The tail is noise: true value (best possible 0.6)", theory.noisy, 0.58),
        _learning("The tail holds the best word: value (best possible 1)", theory.meaningful, 0.9),
        _staleness(theory),
        _draws("The tail is noise, the policy believes one batch", theory.noisy_noise),
        _draws("The best word rises", theory.meaningful_noise),
        _ends(theory),
        _variance("Objectives of 2026: exponent k of variance ~ mu^k as mu -> 0", theory.variances_2026),
        _bias("Objectives of 2026: relative bias of the expected gradient", theory.drift_2026),
        _texts(theory),
        _partings(theory),
    )


def _ends(theory: Theory) -> Sheet:
    def cell(end: float) -> str:
        return f"{end:.3f}" if 0 < end < 1 else f"{end:.0f}"

    rows = tuple(
        (f.objective, f.formula, *map(cell, f.predicted), *map(cell, f.found), *map(cell, f.returned))
        for f in theory.fates
    )
    columns = ("A > 0", "A < 0", "found", "found, A < 0", "from 0.97", "from 0.01, A < 0")
    return Sheet(f"Where a lone token ends, mu = {MU:g}", ("objective", "formula", *columns), rows)


def _texts(theory: Theory) -> Sheet:
    names = list(dict.fromkeys(t.objective for t in theory.texts))
    tvs = [tv for tv in dict.fromkeys(t.tv for t in theory.texts) if tv]
    at = {(t.objective, t.tv): t for t in theory.texts}

    def cells(name: str, tv: float) -> tuple[str, str]:
        t = at[name, tv]
        bias = "0" if t.relative < UNBIASED else f"{t.relative:.2g} (cos {t.cosine:.2f})"
        return bias, f"{t.draws:.3g}" if t.draws < 1e6 else "none leads there"

    rows = tuple((name, *(cell for tv in tvs for cell in cells(name, tv))) for name in names)
    head = ("objective", *(text for tv in tvs for text in (f"bias at tv {tv:g}", "draws")))
    return Sheet("Texts of three words: relative bias, and draws for a signal as large as the noise", head, rows)


def _partings(theory: Theory) -> Sheet:
    rows = tuple(
        (
            f"{p.delta:g}", f"{p.rate:g}", str(p.updates), str(p.staleness), f"{p.tv:.2g}", f"{p.bound_tv:.2g}",
            f"{p.used:.2f}", f"{p.used_measured:.2f}", f"{p.weight:.2g}",
        )
        for p in theory.partings
    )  # fmt: skip
    head = (
        *("delta", "rate", "updates", "staleness", "largest tv", "bound there", "share of the bound used"),
        *("with measured shifts", "largest size of w - 1"),
    )
    return Sheet("How far DRPO and the unregularised surrogate part", head, rows)


def _variance(title: str, variances: Sequence[Variance]) -> Sheet:
    names = list(dict.fromkeys(v.objective for v in variances))
    found = {(v.objective, v.case): v.exponent for v in variances}

    def cell(exponent: float | None) -> str:
        return "silenced" if exponent is None else f"{exponent:.1f}"

    rows = tuple((name, *(cell(found[name, case]) for case in CASES)) for name in names)
    return Sheet(title, ("objective", *CASES), rows)


def _bias(title: str, drifts: Sequence[Drift]) -> Sheet:
    def cell(relative: float) -> str:
        return "0" if relative < UNBIASED else f"{relative:.2g}"

    rows = []
    for d in drifts:
        at = dict(zip(d.tv, d.relative, strict=True))
        grows = "jumps" if d.order is not None and d.order < 0.01 else "" if d.order is None else f"tv^{d.order:.1f}"
        rows.append((d.objective, cell(at[0.0]), *(cell(at[tv]) for tv in _SHOWN_DRIFTS), grows))
    head = ("objective", "tv 0", *(f"tv {tv:g}" for tv in _SHOWN_DRIFTS), "at first")
    return Sheet(title, head, tuple(rows))


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
