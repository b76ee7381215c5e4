"""The papers' claims about one token's gradient, compared with the objectives: fixed points, regions, penalties."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.objectives import DPPO, DRPO, REGISTRY, SPO, ImportanceSampling, Objective, Tokens, gradient, gradient_weight
from drpo.spec import format_spec
from exact.bandit import bandit, descend, distance, surrogate

_ROUNDS = 150
"""Enough to cross the whole range in steps of 1, and then to halve the step some fifty times."""


def lone(pi: Tensor, mu: Tensor, advantage: Tensor) -> Tokens:
    """Return independent tokens from probabilities and advantages, [T] each."""
    n = len(pi)
    return Tokens(pi.log(), mu.log(), advantage, torch.ones(n, dtype=torch.bool), torch.arange(n))


def settle(objective: Objective, mu: Tensor, advantage: Tensor, start: Tensor, step: float = 1.0) -> Tensor:
    """Return where each token's own gradient leads its probability, [T], every token for itself.

    The logit of pi goes the way of -gradient; the step is halved whenever the way turns round. Where the gradient is 0
    the token stays.

    Args:
        objective: any.
        mu: [T] in (0, 1).
        advantage: [T], not 0.
        start: [T] in (0, 1).
        step: first step, in units of the logit.

    Example:
        >>> half = torch.full((2,), 0.5, dtype=torch.float64)
        >>> settle(DRPO(0.2), half, torch.tensor([1.0, -1.0]).double(), start=half)
        tensor([0.7000, 0.3000], dtype=torch.float64)
    """
    x, steps, before = torch.logit(start), torch.full_like(start, step), torch.zeros_like(start)
    for _ in range(_ROUNDS):
        push = -gradient(objective, lone(torch.sigmoid(x), mu, advantage)).sign()
        steps = torch.where(push * before < 0, steps / 2, steps)
        x, before = x + push * steps, push
    return torch.sigmoid(x)


@dataclass(frozen=True)
class FixedPoint:
    """The fixed point of one token's probability.

    Args:
        objective: its spec.
        mu: the sampler's probability of it.
        advantage: 1 or -1.
        predicted: pi* by the formula.
        below, above: where its gradient leads it from 1e-6 and from 1 - 1e-6.
    """

    objective: str
    mu: float
    advantage: float
    predicted: float
    below: float
    above: float

    @property
    def error(self) -> float:
        """The larger distance from the formula."""
        return max(abs(self.below - self.predicted), abs(self.above - self.predicted))


QUADRATIC = (DRPO(0.2), DRPO(0.2, power=0.5), SPO(0.5))
"""pi* = mu + sign(A) delta mu^q with q = 0, 1/2, and 1 (where delta is called epsilon)."""


def fixed_point(objective: Objective, mu: Tensor, advantage: Tensor) -> Tensor:
    """Return pi* = mu + sign(A) delta mu^q of a quadratic objective, [T]; outside (0, 1) there is none.

    Example:
        >>> fixed_point(SPO(0.5), torch.tensor([0.4]), torch.tensor([-1.0]))
        tensor([0.2000])
    """
    radius = objective.epsilon if isinstance(objective, SPO) else objective.delta  # type: ignore[attr-defined]
    power = 1.0 if isinstance(objective, SPO) else objective.power  # type: ignore[attr-defined]
    return mu + advantage.sign() * radius * mu**power


def fixed_points(mus: Sequence[float] = (0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9)) -> tuple[FixedPoint, ...]:
    """Return where the token's own gradient leads from both sides, for every mu whose pi* is in (0, 1)."""
    points: list[FixedPoint] = []
    mu = torch.tensor(mus, dtype=torch.float64).repeat(2)
    advantage = torch.ones(len(mu), dtype=torch.float64)
    advantage[len(mus) :] = -1
    for objective in QUADRATIC:
        predicted = fixed_point(objective, mu, advantage)
        low = settle(objective, mu, advantage, torch.full_like(mu, 1e-6))
        high = settle(objective, mu, advantage, torch.full_like(mu, 1 - 1e-6))
        rows = zip(*(x.tolist() for x in (mu, advantage, predicted, low, high)), strict=True)
        points += [FixedPoint(format_spec(objective, REGISTRY), *row) for row in rows if 0 < row[2] < 1]
    return tuple(points)


@dataclass(frozen=True)
class Stop:
    """Where a token with mu = 0.5 and A = 1 stops, under an objective that masks.

    Args:
        objective: its spec.
        boundary: where its region ends.
        inside: where the token stops when it starts at mu, in steps of 0.002 of the logit.
        outside: where it ends when it starts at 0.95, beyond the boundary.
    """

    objective: str
    boundary: float
    inside: float
    outside: float


def stops(switches: Sequence[tuple[Objective, float]]) -> tuple[Stop, ...]:
    """Return where objectives that mask stop; each is given with its boundary for mu = 0.5 and A = 1."""
    mu, one = torch.full((1,), 0.5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return tuple(
        Stop(
            format_spec(objective, REGISTRY),
            boundary,
            # In small steps throughout: it must reach the boundary, and shows how far it gets.
            float(_creep(objective, mu, one, mu)),
            float(settle(objective, mu, one, torch.full_like(mu, 0.95))),
        )
        for objective, boundary in switches
    )


def _creep(objective: Objective, mu: Tensor, advantage: Tensor, start: Tensor, step: float = 2e-3) -> Tensor:
    x = torch.logit(start)
    for _ in range(350):  # 0.7 of the logit, beyond every boundary asked for
        x = x - step * gradient(objective, lone(torch.sigmoid(x), mu, advantage)).sign()
    return torch.sigmoid(x)


@dataclass(frozen=True)
class Region:
    """DRPO's change of sign, compared with DPPO's mask.

    Args:
        cases: combinations of mu, pi, sign of A and delta.
        outside: of these, beyond the region.
        disagreements: where not (DRPO's weight < 0) = (DPPO's mask is 0) = (pi - mu has passed delta the way of A).
    """

    cases: int
    outside: int
    disagreements: int


def same_region(deltas: Sequence[float] = (0.05, 0.15, 0.5)) -> Region:
    """Compare, over all mu and pi of a grid fine at both ends, and on both sides of the boundary, 1e-9 away."""
    ends = torch.logspace(-8, -1, 40, dtype=torch.float64)
    # 77 steps, so that no pi - mu of the grid is a delta but for rounding: on the boundary itself either is right.
    grid = torch.cat([ends, torch.linspace(0.1, 0.9, 78, dtype=torch.float64)[1:-1], 1 - ends.flip(0)])
    cases = outside = wrong = 0
    for delta in deltas:
        mu, pi = (g.reshape(-1) for g in torch.meshgrid(grid, grid, indexing="ij"))
        for sign in (1.0, -1.0):
            edge = torch.cat([grid + sign * (delta + nudge) for nudge in (1e-9, -1e-9)])
            near = (edge > 0) & (edge < 1)
            all_mu, all_pi = torch.cat([mu, grid.repeat(2)[near]]), torch.cat([pi, edge[near]])
            tokens = lone(all_pi, all_mu, torch.full_like(all_mu, sign))
            left = sign * (all_pi - all_mu) > delta
            pulled = gradient_weight(DRPO(delta), tokens) < 0
            dropped = gradient(DPPO(delta), tokens) == 0
            cases, outside = cases + len(left), outside + int(left.sum())
            wrong += int(((pulled != left) | (dropped != left)).sum())
    return Region(cases, outside, wrong)


@dataclass(frozen=True)
class Penalty:
    """An objective's expected penalty, in units of |A| / (2 radius), compared with the paper's divergence.

    Args:
        objective: its spec.
        divergence: its name.
        penalty: sum over words of mu * penalty / (|A| / (2 radius)), at the farthest of the distributions tried.
        exact: the divergence there.
        error: largest relative difference over all distributions tried.
    """

    objective: str
    divergence: str
    penalty: float
    exact: float
    error: float


def penalties(distributions: int = 20, vocab_size: int = 50, seed: int = 0) -> tuple[Penalty, ...]:
    """Compare SPO's penalty with chi-square, and DRPO's with squared l2, over random pairs of distributions."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    for objective, radius, name in ((SPO(0.3), 0.3, "chi_square"), (DRPO(0.2), 0.2, "squared_l2")):
        pairs: list[tuple[float, float]] = []
        for _ in range(distributions):
            logits = 2 * torch.randn(2, 1, vocab_size, generator=generator, dtype=torch.float64)
            mu = torch.softmax(logits[0], -1)
            # The same advantage for every word: none that rewards less their mean could give, but the penalty's unit.
            problem = bandit(mu, torch.full_like(mu, -0.7), baseline=0.0)
            penalty = surrogate(objective, problem, logits[1]) - surrogate(ImportanceSampling(), problem, logits[1])
            pairs.append((float(penalty / (0.7 / (2 * radius))), getattr(distance(problem, logits[1]), name)))
        error = max(abs(a - b) / b for a, b in pairs)
        results.append(Penalty(format_spec(objective, REGISTRY), name, *max(pairs, key=lambda pair: pair[1]), error))
    return tuple(results)


@dataclass(frozen=True)
class Joint:
    """The fixed point of a whole distribution, where the gradients of all tokens act through one softmax.

    Args:
        mu, advantage: of each word, in turn of contexts.
        alone: mu + sign(A) delta.
        predicted: mu + delta (sign(A) - lambda / |A|), lambda such that it sums to 1.
        found: after gradient descent.
    """

    mu: tuple[float, ...]
    advantage: tuple[float, ...]
    alone: tuple[float, ...]
    predicted: tuple[float, ...]
    found: tuple[float, ...]

    @property
    def error(self) -> float:
        """Largest distance between found and predicted."""
        return max(abs(a - b) for a, b in zip(self.found, self.predicted, strict=True))

    @property
    def away(self) -> float:
        """Largest distance between found and what each word would do alone."""
        return max(abs(a - b) for a, b in zip(self.found, self.alone, strict=True))


def joint_fixed_point(delta: float = 0.05, updates: int = 600) -> Joint:
    """Descend DRPO's expected loss over whole distributions of five words, and return where they end.

    A distribution must sum to 1, so the words cannot all shift by delta. DRPO's expected loss is a convex quadratic in
    pi, and its least point on the simplex, where no probability is driven to 0, is

        pi* = mu + delta (sign(A) - lambda / |A|),   lambda = sum sign(A) / sum 1/|A|
    """
    mu = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    reward = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.1, 0.0, 0.2, 0.9]], dtype=torch.float64)
    problem = bandit(mu, reward)
    a = problem.advantage[0]
    level = a.sign().sum(-1, keepdim=True) / (1 / a.abs()).sum(-1, keepdim=True)
    path = descend(DRPO(delta), problem, mu.log(), learning_rate=4.0, updates=updates)
    predicted = mu + delta * (a.sign() - level / a.abs())
    columns = (mu, a, mu + delta * a.sign(), predicted, torch.softmax(path[-1], -1))
    return Joint(*(tuple(x.reshape(-1).tolist()) for x in columns))
