"""Where a run's tokens lie: pi against mu with the boundaries of regions, and the gradient weights in bins."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from drpo.objectives import DPPO, DRPO, REGISTRY, SPO, Objective, PPOClip, borders, caution, out_of_region
from drpo.objectives.region import has_borders
from drpo.report.figures import COLORS, DASHES, GREY, Plot, brief, make_figure
from drpo.report.token_statistics import Rollouts
from drpo.spec import format_spec
from drpo.types import Tokens

N_SCATTERED = 2000
N_BINS = 60
_TURNS = 4
_TAIL = 5e-4
"""Share of weights at either end that the outermost bins take up, however far out they are."""


def regions(objective: Objective) -> list[Objective]:
    """Return those whose region is drawn: the run's, where it has one in mu and pi, PPO, SPO, DPPO and DRPO, without
    that of its own kind."""
    known = (PPOClip(0.2, 0.28), SPO(0.2), DPPO(0.15), DRPO(0.2))
    others = [o for o in known if type(o) is not type(objective)]
    return [o for o in (objective, *others) if has_borders(o)]


def boundary(objective: Objective, mu: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return `objectives.borders` as arrays; NaN everywhere where the objective has none.

    Args:
        objective: any.
        mu: [N] in (0, 1].

    Example:
        >>> low, high = boundary(DRPO(0.2), np.array([0.1, 0.5, 0.9]))
        >>> low.round(2).tolist(), high.round(2).tolist()
        ([nan, 0.3, 0.7], [0.3, 0.7, nan])
    """
    sides = borders(objective, torch.from_numpy(mu))
    if sides is None:
        return np.full_like(mu, np.nan), np.full_like(mu, np.nan)
    return sides[0].numpy(), sides[1].numpy()


def drawn_at(objective: Objective) -> NDArray[np.float64]:
    """Return the mu at which a border is drawn: close together where its pi nears 0, for logarithmic axes."""
    mu = np.unique(np.concatenate([np.geomspace(1e-8, 1, 121), np.linspace(0, 1, 101)[1:]]))
    for _ in range(4):
        first = _reaches(objective, mu).argmax()
        if first:  # below it a token cannot leave the region downwards
            mu = np.union1d(mu, np.linspace(mu[first - 1], mu[first], 30))
    return mu


def _reaches(objective: Objective, mu: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a token that falls to a probability of 0 has left the region; `borders` would look for where it did."""
    behavior_logp, n = torch.from_numpy(mu).log(), torch.arange(len(mu))
    one = torch.ones_like(behavior_logp)
    left = out_of_region(objective, Tokens(torch.full_like(one, -torch.inf), behavior_logp, one, one.bool(), n))
    return np.zeros(len(mu), bool) if left is None else left.numpy()


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
    traces = [*boundary_traces(objective), *point_traces(shown)]
    mu, pi = {"title": {"text": "μ, the sampler's probability"}}, {"title": {"text": "π, the policy's"}}
    log, linear = {"type": "log", "range": [-5, 0.06], "dtick": 1}, {"range": [-0.02, 1.02]}
    large = make_figure(traces, 640, xaxis=mu | log, yaxis=pi | log)
    small = make_figure(traces, 340, xaxis=mu | linear, yaxis=pi | linear, showlegend=False)
    caption = scatter_text(shown["advantage"], n, regions(objective))
    return [
        Plot("scatter-log", "Logarithmic axes", large, caption, wide=True),
        Plot("scatter-linear", "Linear axes", small, "The same tokens."),
    ]


def scatter_text(advantage: NDArray[np.float64], n: int, known: Sequence[Objective]) -> str:
    """Say which tokens of n are drawn, and which regions have no boundary to draw."""
    some = f"{len(advantage):,} of the {n:,} trained tokens, drawn at random with the run's seed"
    which = some if len(advantage) < n else f"All {n:,} trained tokens"
    beyond = "".join(f" No token can reach the boundary of {format_spec(o, REGISTRY)}." for o in known if caution(o))
    signs = f"{(advantage > 0).sum():,} with A > 0 (circles), {(advantage < 0).sum():,} with A < 0 (diamonds)"
    return f"{which}: {signs}.{beyond}"


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
    for i, other in enumerate(o for o in regions(objective) if caution(o) is None):
        mu, name, is_trained = drawn_at(other), format_spec(other, REGISTRY), other is objective
        form = {"color": COLORS[2 + i % 3], "width": 1.8, "dash": DASHES[1 + i % 3]}
        for pi, first in zip(boundary(other, mu), (True, False), strict=True):
            yield {
                "x": mu.tolist(),
                "y": pi.tolist(),
                "name": f"{name}, this run's" if is_trained else name,
                "legendgroup": name,
                "showlegend": first,
                "line": {"color": GREY, "width": 3.5} if is_trained else form,
                "mode": "lines",
                "hoverinfo": "skip",
            }


def trained_columns(rollouts: Rollouts) -> Mapping[str, NDArray[Any]]:
    """Return all trained tokens of a run, [N] each: mu, pi, weight, advantage."""
    seen = rollouts.statistics
    return {"mu": rollouts.mu[rollouts.trained], "pi": seen.pi, "weight": seen.weight, "advantage": seen.advantage}


def histogram_plot(rollouts: Rollouts) -> Plot | None:
    """Return how many trained tokens had which gradient weight, by sign of the advantage; None where there are none.

    The outermost bins also count what lies beyond them.
    """
    columns = trained_columns(rollouts)
    weight, advantage = columns["weight"].astype(np.float64), columns["advantage"]
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
    figure = make_figure(traces, 400, barmode="overlay", hovermode="x unified", **axes)
    for x, dash in ((0, "dot"), (1, "solid")):
        figure.add_vline(x=x, line={"color": GREY, "width": 1.2, "dash": dash})
    text = (
        f"{len(weight):,} trained tokens, on a logarithmic scale. Weights go from {brief(weight.min())} to "
        f"{brief(weight.max())}; the outermost bins, at {brief(edges[0])} and {brief(edges[-1])}, count all beyond. "
        "Left of the dotted line at 0 tokens are pulled back."
    )
    return Plot("histogram", "Tokens by gradient weight", figure, text, wide=True)


def bin_edges(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return N_BINS + 1 edges that hold all weights but the outermost, and 0 and 1 whatever they are."""
    low, high = np.quantile(weight, [_TAIL, 1 - _TAIL])
    low, high = min(low, 0.0), max(high, 1.0)
    margin = 0.05 * (high - low)
    return np.linspace(low - margin, high + margin, N_BINS + 1)
