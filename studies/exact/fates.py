"""Where a lone token ends under each objective of 2026: a formula, and what its own gradient does."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from drpo.objectives import REGISTRY, Objective, Tokens, gradient
from drpo.spec import format_spec, parse_spec

MU = 0.3
_STEP, _FAR = 0.03, 7.0
"""First step of the logit, and the logit at which the token has gone to 1 or 0."""

End = tuple[float, float]
"""Where a token of A = 1 and one of A = -1 end."""


def root(f: Callable[[float], float], low: float, high: float) -> float:
    """Return where f changes its sign between `low` and `high`, by bisection."""
    sign = f(low) > 0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (f(middle) > 0) == sign else (low, middle)
    return (low + high) / 2


def _both_kl(pi: float) -> float:
    """The larger of KL(Bern(pi) || Bern(MU)) and the other way round."""

    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    return max(kl(pi, MU), kl(MU, pi))


def _eff(sign: int) -> float:
    """pi at which log_tanh's e is 1 + sign delta / MU, for delta = 0.2, high = 2, low = 0."""
    e, top = 1 + sign * 0.2 / MU, math.log(2)
    return MU * (math.exp(top * math.atanh(math.log(e) / top)) if sign > 0 else e)


ENDS: Mapping[str, tuple[str, End]] = {
    "reinforce": ("never stops", (1.0, 0.0)),
    "ipo(0.2)": ("mu + sign(A) delta", (MU + 0.2, MU - 0.2)),
    "icepop(0.5, 2)": ("mu high, mu low", (2 * MU, 0.5 * MU)),
    "kpop(0.05)": (
        "the larger Binary KL is delta",
        (root(lambda pi: _both_kl(pi) - 0.05, MU, 0.9), root(lambda pi: _both_kl(pi) - 0.05, 0.01, MU)),
    ),
    "cppo(0.2)": ("mu + sign(A) delta: DPPO's, where a sequence is one token", (MU + 0.2, MU - 0.2)),
    "vespo": ("never stops: phi > 0", (1.0, 0.0)),
    "gmpo(0.4, 0.4)": ("mu e^high, mu e^-low", (MU * math.exp(0.4), MU * math.exp(-0.4))),
    "m2po(0.04)": ("mu e^(sign(A) sqrt(budget)), alone in its batch", (MU * math.exp(0.2), MU * math.exp(-0.2))),
    "m2po_areal(0.04)": ("never stops, alone in its batch: one token stays", (1.0, 0.0)),
    "topr": ("never stops", (1.0, 0.0)),
    "drpo_eff(0.2)": ("e = 1 + sign(A) delta / mu", (_eff(1), _eff(-1))),
    "kl_cov(1, 0.5)": ("A < 0: r = c / |A|; A > 0: never stops", (1.0, 0.5 * MU)),
    "reinforce + 2*k2": ("r = e^(A / beta)", (MU * math.exp(0.5), MU * math.exp(-0.5))),
    "mask(0.2) + 0.4*k2": (
        "the mask's edge, or r = c |log r| inside",
        (MU + 0.2, root(lambda pi: pi / MU + 0.4 * math.log(pi / MU), MU - 0.2, MU)),
    ),
    "ppo(0.2, 0.28)*proximal": ("p (1 + high), p (1 - low), for p = mu", (MU * 1.28, MU * 0.8)),
    "drpo(0.2)": ("mu + sign(A) delta", (MU + 0.2, MU - 0.2)),
}
"""Objective -> its formula, and where it puts the token."""


@dataclass(frozen=True)
class Fate:
    """Where a lone token of probability `MU` ends.

    Args:
        objective: its spec.
        formula: in words.
        predicted: for A = 1 and for A = -1.
        found: where its own gradient leads it from mu.
        returned: where it leads it from beyond, from 0.97 for A = 1 and 0.01 for A = -1.
    """

    objective: str
    formula: str
    predicted: End
    found: End
    returned: End

    @property
    def error(self) -> float:
        """The larger distance from the formula."""
        return max(abs(a - b) for a, b in zip(self.found, self.predicted, strict=True))

    @property
    def comes_back(self) -> bool:
        """Whether it is brought back from beyond, on either side."""
        return all(abs(a - b) < 0.01 for a, b in zip(self.returned, self.predicted, strict=True))


def end(objective: Objective, advantage: float, start: float) -> float:
    """Return where a token goes that takes steps of its logit against its own gradient; 1 or 0 where it never stops.

    Args:
        objective: any.
        advantage: not 0; it is the score too.
        start: pi at the start, in (0, 1); the sampler's is `MU`, which is the proximal policy's too.
    """
    mu = torch.tensor([MU], dtype=torch.float64).log()
    a, keep, sequence = torch.full_like(mu, advantage), torch.ones(1, dtype=torch.bool), torch.zeros(1).long()

    def push(x: float) -> int:
        logp = torch.nn.functional.logsigmoid(torch.tensor([x], dtype=torch.float64))
        slope = float(gradient(objective, Tokens(logp, mu, a, keep, sequence, proximal_logp=mu, score=a)))
        return (slope < 0) - (slope > 0)

    x, step = math.log(start / (1 - start)), _STEP
    way = push(x)
    while way and abs(x) < _FAR and step > 1e-12:
        new = push(x + way * step)
        if new == way:
            x += way * step
        elif new == 0:  # beyond a boundary, where it would stay: it stops there
            step /= 2
        else:
            x, way, step = x + way * step, new, step / 2
    return 1 / (1 + math.exp(-x)) if abs(x) < _FAR else float(x > 0)


def fates(specs: Sequence[str] = tuple(ENDS)) -> tuple[Fate, ...]:
    """Return where the token ends under each of `ENDS`."""
    rows = []
    for spec in specs:
        formula, predicted = ENDS[spec]
        objective = parse_spec(spec, REGISTRY)
        found = (end(objective, 1.0, MU), end(objective, -1.0, MU))
        returned = (end(objective, 1.0, 0.97), end(objective, -1.0, 0.01))
        rows.append(Fate(format_spec(objective, REGISTRY), formula, predicted, found, returned))
    return tuple(rows)
