"""Where a run's tokens lie: pi against mu with the boundaries of regions, and the gradient weights in bins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drpo.objectives import DPPO, DRPO, SPO, Objective, PPOClip, region_radius, spell
from drpo.report.seen import Rollouts

N_SCATTERED = 3000
N_BINS = 60
MOST_RANGES = 4
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


def region_data(objective: Objective) -> list[dict[str, Any]]:
    """Return the boundaries of `regions`, as JSON-like data."""
    found = []
    for region in regions(objective):
        mu = drawn_at(region)
        low, high = boundary(region, mu)
        curves = {"mu": _rounded(mu), "low": _rounded(low), "high": _rounded(high)} if region.reachable else {}
        found.append({"name": region.name, "own": region.own, "reachable": region.reachable, **curves})
    return found


def drawn_at(region: Region) -> NDArray[np.float64]:
    """Return the mu at which a boundary is drawn: close together where its pi nears 0, for logarithmic axes."""
    vanishing = region.low ** (1 / (1 - region.power)) if region.power < 1 else 0.0
    near = vanishing + np.geomspace(1e-7, 1, 121)
    return np.unique(np.concatenate([near[near <= 1], np.geomspace(1e-8, 1, 121), np.linspace(0, 1, 101)[1:]]))


def scatter_data(rollouts: Rollouts, seed: int) -> dict[str, Any]:
    """Return mu, pi, w and the sign of the advantage of some trained tokens, all of them where they are few.

    Args:
        rollouts: of a run.
        seed: of the choice.
    """
    columns = trained_columns(rollouts)
    n = len(columns["mu"])
    chosen = np.sort(np.random.default_rng(seed % 2**63).permutation(n)[:N_SCATTERED])
    shown = {name: _rounded(columns[name][chosen]) for name in ("mu", "pi", "weight")}
    return {**shown, "sign": np.sign(columns["advantage"][chosen]).astype(int).tolist(), "n": n}


def trained_columns(rollouts: Rollouts) -> Mapping[str, NDArray[Any]]:
    """Return all trained tokens of a run, [N] each: mu, pi, weight, advantage, step."""
    trained = list(rollouts.trained())
    counts = [len(c.mu) for c, _ in trained]

    def joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([np.empty(0), *parts])

    return {
        "mu": joined([c.mu for c, _ in trained]),
        "pi": joined([s.pi for _, s in trained]),
        "weight": joined([s.weight for _, s in trained]),
        "advantage": joined([s.advantage for _, s in trained]),
        "step": np.repeat(np.array([c.record["step"] for c, _ in trained], dtype=int), counts),
    }


def step_ranges(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Split the steps from the first to the last into at most four ranges of about the same length.

    Example:
        >>> step_ranges([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        [(1, 3), (4, 5), (6, 8), (9, 10)]
        >>> step_ranges([1, 1, 2])
        [(1, 1), (2, 2)]
    """
    if not steps:
        return []
    first, last = min(steps), max(steps)
    ends = np.linspace(first - 1, last, min(MOST_RANGES, last - first + 1) + 1)
    edges = [int(np.ceil(end)) for end in ends]
    return [(a + 1, b) for a, b in pairwise(edges) if b > a]


def histogram_data(rollouts: Rollouts) -> dict[str, Any] | None:
    """Return counts of gradient weights, by sign of the advantage, for the whole run and by range of steps.

    The outermost bins also count what lies beyond them. None where no token was trained.
    """
    columns = trained_columns(rollouts)
    weight, advantage, step = columns["weight"], columns["advantage"], columns["step"]
    if len(weight) == 0:
        return None
    edges = bin_edges(weight)
    inside = np.clip(weight, edges[0], edges[-1])
    whole = (int(step.min()), int(step.max()))
    spans = [whole, *(r for r in step_ranges(step.tolist()) if r != whole)]
    counts = [
        {
            "steps": span,
            **{
                name: np.histogram(inside[(step >= span[0]) & (step <= span[1]) & of_sign], edges)[0].tolist()
                for name, of_sign in (("positive", advantage > 0), ("negative", advantage < 0))
            },
        }
        for span in spans
    ]
    return {"edges": edges.tolist(), "counts": counts, "least": float(weight.min()), "greatest": float(weight.max())}


def bin_edges(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return N_BINS + 1 edges that hold all weights but the outermost, and 0 and 1 whatever they are."""
    low, high = np.quantile(weight, [_TAIL, 1 - _TAIL])
    low, high = min(low, 0.0), max(high, 1.0)
    margin = 0.05 * (high - low)
    return np.linspace(low - margin, high + margin, N_BINS + 1)


def _rounded(values: NDArray[Any]) -> list[float]:
    """Four significant digits: more than a plot can show."""
    return [float(f"{x:.4g}") for x in values]
