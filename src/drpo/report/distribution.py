"""Where a run's tokens lie: pi against mu with the boundaries of regions, and the gradient weights in bins."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from drpo.objectives import DPPO, DRPO, SPO, Objective, PPOClip, borders, caution, spell
from drpo.report.seen import Rollouts

N_SCATTERED = 3000
N_BINS = 60
MOST_RANGES = 4
_TAIL = 5e-4
"""Share of weights at either end that the outermost bins take up, however far out they are."""


def regions(objective: Objective) -> list[Objective]:
    """Return those whose region is drawn: the run's, where it has one in mu and pi, PPO, SPO, DPPO and DRPO, without
    that of its own kind."""
    known = (PPOClip(0.2, 0.28), SPO(0.2), DPPO(0.15), DRPO(0.2))
    others = [o for o in known if type(o) is not type(objective)]
    return [o for o in (objective, *others) if borders(o, torch.ones(1, dtype=torch.float64)) is not None]


def region_data(objective: Objective) -> list[dict[str, Any]]:
    """Return the borders of `regions`, as JSON-like data."""
    return [
        {"name": spell(o), "own": o is objective, "reachable": caution(o) is None, **_curves(o)}
        for o in regions(objective)
    ]


def _curves(objective: Objective) -> dict[str, list[float]]:
    """The pi at which a token leaves the region, over mu; nothing where none can."""
    if caution(objective) is not None:
        return {}
    mu = drawn_at(objective)
    low, high = boundary(objective, mu)
    return {"mu": _rounded(mu), "low": _rounded(low), "high": _rounded(high)}


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
    found = borders(objective, torch.from_numpy(mu))
    if found is None:
        return np.full_like(mu, np.nan), np.full_like(mu, np.nan)
    return found[0].numpy(), found[1].numpy()


def drawn_at(objective: Objective) -> NDArray[np.float64]:
    """Return the mu at which a border is drawn: close together where its pi nears 0, for logarithmic axes."""
    near = _vanishing(objective) + np.geomspace(1e-7, 1, 121)
    return np.unique(np.concatenate([near[near <= 1], np.geomspace(1e-8, 1, 121), np.linspace(0, 1, 101)[1:]]))


def _vanishing(objective: Objective) -> float:
    """The mu below which a token cannot leave the region downwards, to 1e-8; 0 where it always can."""
    low, high = 1e-8, 1.0
    for _ in range(4):
        mu = np.linspace(low, high, 200)
        leaves = np.isfinite(boundary(objective, mu)[0])
        first = int(leaves.argmax()) if leaves.any() else len(mu) - 1
        if first == 0:
            return 0.0 if low == 1e-8 else float(mu[0])
        low, high = float(mu[first - 1]), float(mu[first])
    return high


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
