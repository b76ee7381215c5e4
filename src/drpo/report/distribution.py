"""Where a run's tokens lie: pi against mu with the boundaries of regions, and the gradient weights in bins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.objectives import DPPO, DRPO, SPO, Objective, PPOClip, region_radius, spell
from drpo.report.figures import DASHES, GREY, WIDE, Plot, brief, make_figure
from drpo.report.palette import COLORS
from drpo.report.seen import Rollouts

N_SCATTERED = 2000
N_BINS = 60
_TURNS = 4
_TAIL = 5e-4
"""Share of weights at either end that the outermost bins take up, however far out they are."""


@dataclass(frozen=True)
class Region:
    """A trust region of one token: mu - low mu^power <= pi <= mu + high mu^power.

    Args:
        name: as the objective is spelled.
        low: radius for falling probabilities.
        high: radius for rising ones.
        power: 0 for a region in |pi - mu|, 1 for one in the ratio.
        own: whether it is the run's.
    """

    name: str
    low: float
    high: float
    power: float
    own: bool = False

    @property
    def reachable(self) -> bool:
        """Whether any token can leave it."""
        return self.power > 0 or min(self.low, self.high) < 1


def region_of(objective: Objective, own: bool = False) -> Region | None:
    """Return the region of an objective in pi and mu; None where it has none.

    Example:
        >>> region_of(PPOClip(0.2, 0.28))
        Region(name='ppo(0.2, 0.28)', low=0.2, high=0.28, power=1.0, own=False)
    """
    name = spell(objective)
    match objective:
        case PPOClip(low=low, high=high):
            return Region(name, low, high, 1.0, own)
        case SPO(epsilon=epsilon):
            return Region(name, epsilon, epsilon, 1.0, own)
        case DRPO(delta=delta, power=power):
            return Region(name, delta, delta, power, own)
        case DPPO(delta_low=low, delta_high=high, divergence="tv"):
            return Region(name, low, low if high is None else high, 0.0, own)
    if hasattr(objective, "delta") and not objective.needs and getattr(objective, "divergence", "tv") == "tv":
        radius = region_radius(objective)
        return Region(name, radius, radius, 0.0, own)
    return None


def regions(objective: Objective) -> list[Region]:
    """Return the run's region, where it has one, and those of PPO, SPO, DPPO and DRPO, without that of its own kind."""
    own = region_of(objective, own=True)
    known = (PPOClip(0.2, 0.28), SPO(0.2), DPPO(0.15), DRPO(0.2))
    others = [region_of(o) for o in known if type(o) is not type(objective)]
    return [region for region in (own, *others) if region is not None]


def boundary(region: Region, mu: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probabilities pi at which a token leaves a region, below and above; NaN where it cannot.

    Args:
        region: any.
        mu: [N] in (0, 1].

    Example:
        >>> low, high = boundary(Region("", 0.2, 0.2, 0.0), np.array([0.1, 0.5, 0.9]))
        >>> low.round(2).tolist(), high.round(2).tolist()
        ([nan, 0.3, 0.7], [0.3, 0.7, nan])
    """
    low = mu - region.low * mu**region.power
    high = mu + region.high * mu**region.power
    return np.where(low > 0, low, np.nan), np.where(high < 1, high, np.nan)


def drawn_at(region: Region) -> NDArray[np.float64]:
    """Return the mu at which a boundary is drawn: close together where its pi nears 0, for logarithmic axes."""
    vanishing = region.low ** (1 / (1 - region.power)) if region.power < 1 else 0.0
    near = vanishing + np.geomspace(1e-7, 1, 121)
    return np.unique(np.concatenate([near[near <= 1], np.geomspace(1e-8, 1, 121), np.linspace(0, 1, 101)[1:]]))


def scatter_plots(rollouts: Rollouts, objective: Objective, seed: int) -> list[Plot]:
    """Return pi against mu of some trained tokens, on logarithmic and on linear axes; none where no token was trained.

    Args:
        rollouts: of a run.
        objective: the run's.
        seed: of the choice of tokens.
    """
    columns = trained_columns(rollouts)
    n = len(columns["mu"])
    if n == 0:
        return []
    chosen = np.sort(np.random.default_rng(seed % 2**63).permutation(n)[:N_SCATTERED])
    shown = {name: columns[name][chosen] for name in ("mu", "pi", "weight", "advantage")}
    text = scatter_text(shown["advantage"], n, regions(objective))
    traces = [*boundary_traces(objective), *point_traces(shown)]
    mu, pi = {"title": {"text": "μ, the sampler's probability"}}, {"title": {"text": "π, the policy's"}}
    log, linear = {"type": "log", "range": [-5, 0.06], "dtick": 1}, {"range": [-0.02, 1.02]}
    return [
        Plot(
            "scatter-log",
            "Logarithmic axes",
            make_figure(traces, 640, xaxis=mu | log, yaxis=pi | log),
            text,
            text,
            True,
        ),
        Plot(
            "scatter-linear",
            "Linear axes",
            make_figure(traces, 340, xaxis=mu | linear, yaxis=pi | linear, showlegend=False),
            text,
            "The same tokens.",
        ),
    ]


def scatter_text(advantage: NDArray[np.float64], n: int, known: Sequence[Region]) -> str:
    """Say which tokens of n are drawn, and which regions have no boundary to draw."""
    some = f"{len(advantage):,} of the {n:,} trained tokens, drawn at random with the run's seed"
    which = some if len(advantage) < n else f"All {n:,} trained tokens"
    out_of_reach = "".join(f" No token can reach the boundary of {r.name}." for r in known if not r.reachable)
    return (
        f"{which}: {(advantage > 0).sum():,} with A > 0 (circles), {(advantage < 0).sum():,} with A < 0 "
        f"(diamonds).{out_of_reach}"
    )


def point_traces(shown: Mapping[str, NDArray[np.float64]]) -> Iterator[dict[str, Any]]:
    """Yield the tokens, the signs of A in turns, so that neither hides the other."""
    for turn in range(_TURNS):
        for i, (name, sign, symbol) in enumerate((("A > 0", 1, "circle"), ("A < 0", -1, "diamond"))):
            at = np.flatnonzero(np.sign(shown["advantage"]) == sign)[turn::_TURNS]
            columns = {key: [float(f"{x:.4g}") for x in shown[key][at]] for key in ("mu", "pi", "weight")}
            yield {
                "x": columns["mu"],
                "y": columns["pi"],
                "customdata": columns["weight"],
                "name": name,
                "legendgroup": name,
                "showlegend": turn == 0,
                "mode": "markers",
                "marker": {"color": COLORS[i], "size": 5, "opacity": 0.5, "symbol": symbol},
                "hovertemplate": "μ %{x:.3~g}<br>π %{y:.3~g}<br>w %{customdata:.3~g}<extra></extra>",
            }


def boundary_traces(objective: Objective) -> Iterator[dict[str, Any]]:
    """Yield the diagonal, and the boundaries of the regions that a token can leave; the run's own is the solid line."""
    diagonal = {"line": {"color": GREY, "width": 1}, "mode": "lines", "hoverinfo": "skip"}
    yield {"x": [1e-8, 1], "y": [1e-8, 1], "name": "π = μ", **diagonal}
    for i, region in enumerate(r for r in regions(objective) if r.reachable):
        mu = drawn_at(region)
        other = {"color": COLORS[2 + i % 3], "width": 1.8, "dash": DASHES[1 + i % 3]}
        line = {"color": GREY, "width": 3.5} if region.own else other
        for pi, first in zip(boundary(region, mu), (True, False), strict=True):
            yield {
                "x": mu.tolist(),
                "y": pi.tolist(),
                "name": f"{region.name}, this run's" if region.own else region.name,
                "legendgroup": region.name,
                "showlegend": first,
                "line": line,
                "mode": "lines",
                "hoverinfo": "skip",
            }


def trained_columns(rollouts: Rollouts) -> Mapping[str, NDArray[Any]]:
    """Return all trained tokens of a run, [N] each: mu, pi, weight, advantage."""
    trained = list(rollouts.trained())

    def joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([np.empty(0), *parts])

    return {
        "mu": joined([c.mu for c, _ in trained]),
        "pi": joined([s.pi for _, s in trained]),
        "weight": joined([s.weight for _, s in trained]),
        "advantage": joined([s.advantage for _, s in trained]),
    }


def histogram_plot(rollouts: Rollouts) -> Plot | None:
    """Return how many trained tokens had which gradient weight, by sign of the advantage; None where there are none.

    The outermost bins also count what lies beyond them.
    """
    columns = trained_columns(rollouts)
    weight, advantage = columns["weight"], columns["advantage"]
    if len(weight) == 0:
        return None
    edges = bin_edges(weight)
    inside = np.clip(weight, edges[0], edges[-1])
    traces = [
        {
            "type": "bar",
            "x": edges[:-1].tolist(),
            "y": np.histogram(inside[of_sign], edges)[0].tolist(),
            "width": float(edges[1] - edges[0]),
            "offset": 0,
            "name": name,
            "marker": {"color": COLORS[i], "opacity": 0.6, "pattern": {"shape": ("", "/")[i], "size": 6}},
            "hovertemplate": "w from %{x:.3~g}: %{y} tokens",
        }
        for i, (name, of_sign) in enumerate((("A > 0", advantage > 0), ("A < 0", advantage < 0)))
    ]
    axes = {
        "xaxis": {"title": {"text": "gradient weight w"}, "zeroline": False},
        "yaxis": {"title": {"text": "tokens"}, "type": "log", "dtick": 1},
    }
    figure = make_figure(traces, WIDE, barmode="overlay", hovermode="x unified", **axes)
    for x, dash in ((0, "dot"), (1, "solid")):
        figure.add_vline(x=x, line={"color": GREY, "width": 1.2, "dash": dash})
    text = (
        f"{len(weight):,} trained tokens, on a logarithmic scale. Weights go from {brief(weight.min())} to "
        f"{brief(weight.max())}; the outermost bins, at {brief(edges[0])} and {brief(edges[-1])}, count all beyond. "
        "Left of the dotted line at 0 tokens are pulled back."
    )
    return Plot("histogram", "Tokens by gradient weight", figure, text, text, wide=True)


def bin_edges(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return N_BINS + 1 edges that hold all weights but the outermost, and 0 and 1 whatever they are."""
    low, high = np.quantile(weight, [_TAIL, 1 - _TAIL])
    low, high = min(low, 0.0), max(high, 1.0)
    margin = 0.05 * (high - low)
    return np.linspace(low - margin, high + margin, N_BINS + 1)
