"""The gradient weight of objectives over pi, for given mu: the one picture that shows how they differ."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import plotext
import torch
from matplotlib.figure import Figure
from torch import Tensor

from drpo.files import save_figure
from drpo.objectives import REGISTRY, TOPK, Objective, Tokens, caution, gradient_weight, needed_divergence
from drpo.report.figures import COLORS
from drpo.spec import format_spec
from drpo.terminal import without_padding

matplotlib.rcdefaults()  # not those of a matplotlibrc in the working folder
matplotlib.use("Agg")
_Y_RANGE = (-2.0, 3.0)


def weight_curve(objective: Objective, mu: float, advantage: float, pi: Tensor) -> Tensor:
    """Return w at each pi, [N], for a token that the sampler gave probability mu.

    Args:
        objective: any; for a sequence-level one each token stands for a sequence of its own; the score is A, and
            the sampler is the proximal policy and the reference.
        mu: in (0, 1].
        advantage: not 0.
        pi: [N] in (0, 1].

    Example:
        >>> from drpo.objectives import DRPO
        >>> weight_curve(DRPO(0.2), 0.5, 1.0, torch.tensor([0.5, 0.6, 0.8]))
        tensor([ 1.0000,  0.5000, -0.5000])
    """
    n = len(pi)
    logp, behavior_logp = pi.double().log(), torch.full((n,), mu, dtype=torch.float64).log()
    kind = needed_divergence(objective.needs)
    tokens = Tokens(
        logp,
        behavior_logp,
        torch.full((n,), advantage, dtype=torch.float64),
        torch.ones(n, dtype=torch.bool),
        torch.arange(n),
        # With one token alone a top-K divergence is the binary one: all other words are the rest.
        None if kind is None else TOPK[kind](logp[:, None], behavior_logp[:, None]),
        proximal_logp=behavior_logp,
        reference_logp=behavior_logp,
        score=torch.full((n,), advantage, dtype=torch.float64),
    )
    return gradient_weight(objective, tokens).float()


def beyond_axis(objectives: Sequence[Objective], mu: float, advantage: float) -> list[str]:
    """Return, of each objective whose w leaves the drawn axis, its spec and the range of its w over all pi.

    Args:
        objectives: any.
        mu: in (0, 1].
        advantage: not 0.

    Example:
        >>> from drpo.objectives import DRPO, SPO
        >>> beyond_axis([DRPO(0.5), SPO(0.2)], 0.5, 1.0)
        ['spo(0.2) from -4 to 6']
    """
    lines = []
    for objective in objectives:
        w = weight_curve(objective, mu, advantage, torch.linspace(1e-4, 1, 2000))
        low, high = float(w[~w.isnan()].min()), float(w[~w.isnan()].max())
        if low < _Y_RANGE[0] or high > _Y_RANGE[1]:
            lines.append(f"{format_spec(objective, REGISTRY)} from {_short(low)} to {_short(high)}")
    return lines


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw_png(objectives: Sequence[Objective], mus: Sequence[float], path: Path) -> None:
    """Draw one panel per mu and sign of the advantage, one line per objective; say below a panel what is cut off."""
    figure = Figure(figsize=(4.2 * len(mus), 6.4), layout="constrained")
    grid = figure.subplots(2, len(mus), squeeze=False, sharey=True)
    pi = torch.linspace(1e-4, 1, 2000)
    for row, advantage in enumerate((1.0, -1.0)):
        for column, mu in enumerate(mus):
            axes = grid[row, column]
            for i, objective in enumerate(objectives):
                w = weight_curve(objective, mu, advantage, pi)
                axes.plot(pi, w, color=COLORS[i % len(COLORS)], label=_label(objective), linewidth=1.7)
            axes.axvline(mu, color="0.6", linestyle=":", linewidth=1)
            axes.axhline(0, color="0.6", linewidth=0.7)
            axes.set(title=f"mu = {mu:g}, {'A > 0' if advantage > 0 else 'A < 0'}", ylim=_Y_RANGE, xlim=(0, 1))
            axes.set_xlabel(
                "\n".join(["pi", *(f"cut off: w of {line}" for line in beyond_axis(objectives, mu, advantage))])
            )
            axes.grid(alpha=0.2)
        grid[row, 0].set_ylabel("gradient weight w")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle("d loss / d logp = -A r w: what each method does to a token's gradient as pi leaves mu (dotted)")
    save_figure(figure, path)


def _label(objective: Objective) -> str:
    return format_spec(objective, REGISTRY) + ("" if caution(objective) is None else ": out of reach")


def draw_text(objectives: Sequence[Objective], mu: float, advantage: float, width: int, height: int = 18) -> str:
    """Return one panel as text, for a terminal, and a line below it for each w that is drawn at the axis's edge."""
    pi = torch.linspace(1e-3, 1, 4 * width)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    for objective, marker in zip(objectives, "ox+*#%@&" * len(objectives), strict=False):
        w = weight_curve(objective, mu, advantage, pi).clamp(*_Y_RANGE)
        plotext.plot(pi.tolist(), w.tolist(), label=_label(objective), marker=marker)
    plotext.ylim(*_Y_RANGE)
    plotext.title(f"gradient weight w over pi, mu = {mu:g}, {'A > 0' if advantage > 0 else 'A < 0'}")
    low, high = _Y_RANGE
    clamped = [
        f"beyond {low:g} to {high:g}, drawn at the edge: w of {s}" for s in beyond_axis(objectives, mu, advantage)
    ]
    return without_padding("\n".join([plotext.uncolorize(plotext.build()), *clamped]))
