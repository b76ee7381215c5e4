"""What the exact problems of the lab found: tables, figures and a JSON file."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo.files import save_figure, write_text
from drpo.lab.drift import UNBIASED
from drpo.lab.long_tail import Learnt, Noise, Training
from drpo.lab.theory import Theory, checks, examine
from drpo.lab.variance import CASES, MUS
from drpo.report.palette import COLORS

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")
_STYLES = ("-", "--", ":")
_SHOWN_DRIFTS = (0.001, 0.01, 0.05, 0.1, 0.3, 0.6)
_SHOWN_ROUNDS = (0, 1, 5, 10, 15)


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Args:
        title: one line.
        head: of the columns.
        rows: each as long as the head.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table, without its title, as Markdown writes one.

        Example:
            >>> print(Sheet("t", ("a", "b"), (("1", "x"),)).markdown())
            | a | b |
            |---|---|
            | 1 | x |
        """
        rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(self.head), *lines[1:]])


def exact_report(folder: Path, theory: Theory | None = None) -> tuple[Sheet, ...]:
    """Run every exact check, write `exact.json`, `exact.md` and the figures, and return the tables.

    Args:
        folder: made where it is missing.
        theory: what was found, where it is known already.
    """
    found = theory or examine()
    folder.mkdir(parents=True, exist_ok=True)
    record = plain({"checks": [asdict(c) for c in checks(found)], **asdict(found), "variance_mu": MUS})
    write_text(folder / "exact.json", json.dumps(record, indent=1) + "\n")
    drawn = sheets(found)
    text = "\n\n".join(f"**{s.title}**\n\n{s.markdown()}" for s in drawn)
    write_text(folder / "exact.md", text + "\n")
    for name, draw in FIGURES.items():
        draw(found, folder / name)
    return drawn


def plain(value: Any) -> Any:
    """The same in what JSON knows: no infinities, which become null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    for found in learnt:
        reached = found.reached(level)
        values = (f"{found.value[r]:.3f}" for r in rounds)
        rows.append((found.objective, *values, "never" if reached is None else str(reached)))
    return Sheet(title, ("objective", *(f"round {r}" for r in rounds), f"reaches {level:g} in round"), tuple(rows))


def _staleness(theory: Theory) -> Sheet:
    columns = {c.updates: {found.objective: found.value[-1] for found in c.learnt} for c in theory.noisy_staleness}
    columns[Training().updates] = {found.objective: found.value[-1] for found in theory.noisy}
    names = [found.objective for found in theory.noisy_staleness[0].learnt]
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


def _line(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % 7], "linestyle": _STYLES[index // 7], "linewidth": 1.6}


def _save(figure: Figure, path: Path) -> None:
    save_figure(figure, path, metadata={"Software": None})


def _draw_variance(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    shown = ("shift 0.1, A > 0", "shift 0.1, A < 0")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, case in zip(grid, shown, strict=True):
        for i, v in enumerate(v for v in theory.variances if v.case == case):
            pairs = [(mu, y) for mu, y in zip(MUS, v.variance, strict=True) if y > 1e-30]
            if pairs:
                axes.loglog(*zip(*pairs, strict=True), label=v.objective, **_line(i))
        axes.set(title=case, xlabel="mu")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("variance of one draw's gradient")
    grid[1].legend(fontsize=7, ncols=2)
    figure.suptitle("A rare word that has risen by 0.1: who pays for it in variance (not drawn: silenced)")
    _save(figure, path)


def _draw_fixed_points(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes: Axes = figure.subplots()
    names = list(dict.fromkeys(p.objective for p in theory.fixed_points))
    for i, name in enumerate(names):
        for sign in (1.0, -1.0):
            mine = [p for p in theory.fixed_points if p.objective == name and p.advantage == sign]
            mu = [p.mu for p in mine]
            label = name if sign > 0 else None
            axes.plot(mu, [p.predicted for p in mine], label=label, **(_line(i) | {"alpha": 0.6}))
            for side, marker in (("below", "^"), ("above", "v")):
                axes.plot(mu, [getattr(p, side) for p in mine], marker, color=COLORS[i], markersize=5, fillstyle="none")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(xlabel="mu", ylabel="pi*", xlim=(0, 1), ylim=(0, 1))
    title = "Fixed points of one token: formula (lines),\nfound from below (^) and above (v); upper: A > 0"
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    _save(figure, path)


def _draw_bias(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(7.6, 5), layout="constrained")
    axes: Axes = figure.subplots()
    for i, d in enumerate(theory.drift):
        pairs = [(tv, b) for tv, b in zip(d.tv, d.relative, strict=True) if tv > 0 and b > UNBIASED]
        if pairs:
            axes.loglog(*zip(*pairs, strict=True), marker=".", label=d.objective, **_line(i))
    axes.set(xlabel="total variation between mu and pi", ylabel="|expected step - true| / |true|", ylim=(1e-6, 100))
    axes.set_title("Bias along a drift the way of the advantages (not drawn: exactly 0)", fontsize=10)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.25)
    _save(figure, path)


def _draw_long_tail(theory: Theory, path: Path) -> None:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.subplots(1, 2)
    titles = ("The tail is noise", "The tail holds the best word")
    for axes, learnt, title in zip(grid, (theory.noisy, theory.meaningful), titles, strict=True):
        for i, found in enumerate(learnt):
            axes.plot(found.value, label=found.objective, **_line(i))
        axes.set(title=title, xlabel="rollouts", ylabel="true expected reward")
        axes.grid(alpha=0.25)
    grid[1].legend(fontsize=7, loc="upper left")
    _save(figure, path)


FIGURES: dict[str, Callable[[Theory, Path], None]] = {
    "exact_variance.png": _draw_variance,
    "exact_fixed_points.png": _draw_fixed_points,
    "exact_bias.png": _draw_bias,
    "exact_long_tail.png": _draw_long_tail,
}
"""File -> what draws it."""
