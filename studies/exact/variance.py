"""How noisy each objective's gradient becomes as a word becomes rare: exponents of the power law in mu."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.objectives import REGISTRY, Objective
from drpo.spec import format_spec
from exact.bandit import bandit, estimate

MUS = tuple(float(x) for x in torch.logspace(-8, -2, 13, dtype=torch.float64))
"""1e-8 to 1e-2; ratios stay below the cap of e^20 = 4.9e8."""

_FITTED = 5
"""The smallest mus, 1e-8 to 1e-6, that the exponent is fitted to."""


@dataclass(frozen=True)
class Variance:
    """Variance of the gradient of a word that has moved, over mu.

    Args:
        objective: its spec.
        case: a name of `CASES`.
        variance: trace of one draw's covariance at each of `MUS`.
        exponent: k of variance ~ mu^k as mu -> 0; None where the variance is 0 there: the word is silenced.
    """

    objective: str
    case: str
    variance: tuple[float, ...]
    exponent: float | None


CASES: dict[str, tuple[float, float | None, float | None]] = {
    "shift 0.1, A > 0": (1.0, 0.1, None),
    "shift 0.1, A < 0": (-1.0, 0.1, None),
    "ratio 1.1, A > 0": (1.0, None, 1.1),
    "ratio 3, A > 0": (1.0, None, 3.0),
}
"""Name -> sign of the advantage, and the fixed shift pi - mu or ratio pi / mu. As mu -> 0 a word can only rise."""


def word_variance(objective: Objective, mu: float, pi: float, advantage: float) -> float:
    """Return the trace of the covariance of one draw's gradient, where one word of two has an advantage.

    The other word's advantage is 0: all variance is the word's own.

    Args:
        objective: any.
        mu, pi: the word's probabilities.
        advantage: of the word.

    Example:
        >>> from drpo.objectives import ImportanceSampling
        >>> round(word_variance(ImportanceSampling(), 0.5, 0.5, 1.0), 6)  # 2 (1 - pi)^2 r^2 (mu - mu^2)
        0.125
    """
    distributions = torch.tensor([[mu, 1 - mu], [pi, 1 - pi]], dtype=torch.float64)
    reward = torch.tensor([advantage, 0.0], dtype=torch.float64)
    problem = bandit(distributions[0], reward, baseline=0.0)
    return estimate(objective, problem, distributions[1:].log()).trace


def variances(objectives: Sequence[Objective], mus: Sequence[float] = MUS) -> tuple[Variance, ...]:
    """Return the variance over mu of each objective in each of `CASES`, with its exponent."""
    results = []
    for objective in objectives:
        for case, (advantage, moved, factor) in CASES.items():
            pis = [mu + moved if moved is not None else mu * (factor or 1.0) for mu in mus]
            traces = [word_variance(objective, mu, pi, advantage) for mu, pi in zip(mus, pis, strict=True)]
            results.append(Variance(format_spec(objective, REGISTRY), case, tuple(traces), _exponent(mus, traces)))
    return tuple(results)


def _exponent(mus: Sequence[float], traces: Sequence[float]) -> float | None:
    """Least-squares slope of log variance over log mu, at the smallest mus."""
    x, y = (torch.tensor(column[:_FITTED], dtype=torch.float64).log() for column in (mus, traces))
    if not bool(torch.isfinite(y).all()):
        return None
    return float(_slope(x, y))


def _slope(x: Tensor, y: Tensor) -> Tensor:
    return ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
