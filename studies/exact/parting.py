"""How far DRPO(delta) can part from the unregularised surrogate: a bound, and how much of it exact problems use up.

Both descend the expected loss of one context from the same logits, with the same learning rate eta, on data of one
sampler mu. With R the range and w the largest size of the words' mean advantages, D_k the largest |pi - mu| of DRPO's
policy after k updates, and B_k the distance of the two policies' logits after k updates,

    D_{k+1} <= min(1, D_k + eta (R / 8 + w D_k / (4 delta)))
    B_{k+1} <= (1 + eta R / 2) B_k + eta w D_k / (sqrt(2) delta)
    total variation between them <= B_k / (2 sqrt(2))

docs/theory_checked.md proves it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.objectives import DRPO, ImportanceSampling
from exact.bandit import Bandit, bandit, descend

DELTAS = (0.05, 0.2, 1.0, 12.5)
UPDATES = (2, 16)
STALENESS = (0, 16)
RATES = (0.1, 1.0)
"""Learning rates of the logits; advantages are of size 1."""


@dataclass(frozen=True)
class Sizes:
    """What the bound reads of a problem.

    Args:
        spread: R, the largest less the smallest mean advantage of a word, the larger of all contexts.
        largest: w, the largest mean of |A| of a word.
    """

    spread: float
    largest: float


def sizes(problem: Bandit) -> Sizes:
    """Return R and w of a problem.

    Example:
        >>> sizes(bandit(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])))
        Sizes(spread=1.0, largest=0.5)
    """
    mean = (problem.chance * problem.advantage).sum(0)
    absolute = (problem.chance * problem.advantage.abs()).sum(0)
    return Sizes(float((mean.amax(-1) - mean.amin(-1)).max()), float(absolute.max()))


@dataclass(frozen=True)
class Bound:
    """The bound after K updates.

    Args:
        shift: D_K, of a word's probability from the sampler's.
        logits: B_K, the distance of the two policies' logits.
        tv: of total variation between the two policies.
    """

    shift: float
    logits: float
    tv: float


def stale_shift(of: Sizes, delta: float, rate: float, staleness: int) -> float:
    """Return a bound of |pi - mu| where pi is `staleness` updates of either objective after mu, on any data.

        min(1, s eta (R / 8 + w / (4 delta)))

    Example:
        >>> round(stale_shift(Sizes(1.0, 1.0), 12.5, 0.1, 4), 6)
        0.058
    """
    return min(1.0, staleness * rate * (of.spread / 8 + of.largest / (4 * delta)))


def bound(
    of: Sizes, delta: float, rate: float, updates: int, shift: float, measured: Sequence[float] | None = None
) -> Bound:
    """Return the bound after some updates.

    Args:
        of: sizes of the advantages.
        delta: DRPO's radius.
        rate: eta, the learning rate of the logits.
        updates: K.
        shift: D_0, the largest |pi - mu| before the first update: `stale_shift`, or a measured one.
        measured: D_0 to D_{K-1} as measured along DRPO's path, in place of their bounds.

    Example:
        >>> found = bound(Sizes(1.0, 1.0), delta=12.5, rate=0.1, updates=16, shift=0.0)
        >>> round(found.logits, 4), round(found.tv, 4)
        (0.0109, 0.0039)
    """
    apart = 0.0
    for k in range(updates):
        shift = shift if measured is None else measured[k]
        apart = (1 + rate * of.spread / 2) * apart + rate * of.largest * shift / (math.sqrt(2) * delta)
        shift = min(1.0, shift + rate * (of.spread / 8 + of.largest * shift / (4 * delta)))
    return Bound(shift, apart, min(1.0, apart / (2 * math.sqrt(2))))


@dataclass(frozen=True)
class Parting:
    """How far the two policies were apart, beside the bound.

    Args:
        delta, rate, updates, staleness: of the case.
        logits: largest distance of the logits after the updates.
        tv: largest total variation between the two policies.
        bound: the bound of `logits`, from the staleness alone.
        bound_tv: that of `tv`.
        used: largest share of the bound of `logits` that a problem uses up.
        used_measured: the same of the bound with the measured shifts.
        weight: largest |w - 1| of any word along DRPO's path.
    """

    delta: float
    rate: float
    updates: int
    staleness: int
    logits: float
    tv: float
    bound: float
    bound_tv: float
    used: float
    used_measured: float
    weight: float


def part(problem: Bandit, start: Tensor, delta: float, rate: float, updates: int, staleness: int) -> Parting:
    """Return how far the two objectives part on a problem of one context, from the same logits.

    Args:
        problem: both are held to its sampler.
        start: [1, V]; the policy before the first update, `staleness` updates after the sampler.
        delta: DRPO's radius.
        rate: learning rate.
        updates: K.
        staleness: s.
    """
    held = descend(DRPO(delta), problem, start, rate, updates)
    free = descend(ImportanceSampling(), problem, start, rate, updates)
    mu = problem.behavior_logp.exp()
    shifts = [float((torch.softmax(logits, -1) - mu).abs().max()) for logits in held]
    apart = float((held[-1] - free[-1]).norm())
    tv = float((torch.softmax(held[-1], -1) - torch.softmax(free[-1], -1)).abs().sum() / 2)
    of = sizes(problem)
    said = bound(of, delta, rate, updates, stale_shift(of, delta, rate, staleness))
    seen = bound(of, delta, rate, updates, shifts[0], shifts)

    def share(value: float, most: float) -> float:
        return value / most if most else math.inf if value > 1e-12 else 0.0

    return Parting(
        delta, rate, updates, staleness, apart, tv, said.logits, said.tv, share(apart, said.logits),
        share(apart, seen.logits), max(shifts[:-1]) / delta,
    )  # fmt: skip


def stale_start(problem: Bandit, delta: float, rate: float, staleness: int, generator: torch.Generator) -> Tensor:
    """Return logits that are `staleness` updates of DRPO after the sampler, each on rewards of its own."""
    logits, most = problem.behavior_logp, sizes(problem)
    for _ in range(staleness):
        other = bandit(torch.softmax(logits, -1), torch.randn(problem.reward.shape, generator=generator).double())
        scale = min(most.spread / sizes(other).spread, most.largest / sizes(other).largest)
        other = bandit(torch.softmax(logits, -1), other.reward * scale)
        logits = descend(DRPO(delta), other, logits, rate, 1)[-1]
    return logits


def some_problems(n: int, seed: int) -> list[Bandit]:
    """Return problems of 2 to 25 words, of even and of peaked samplers, with normal or with 0/1 rewards."""
    generator = torch.Generator().manual_seed(seed)
    problems = []
    for i in range(n):
        words = (2, 5, 25)[i % 3]
        mu = torch.softmax((i % 4) * torch.randn(words, generator=generator, dtype=torch.float64), -1)
        reward = torch.randn(words, generator=generator, dtype=torch.float64)
        reward = reward if i % 2 else (reward > reward.median()).double()
        reward[0], reward[-1] = 1.0, 0.0
        problems.append(bandit(mu, reward))
    return problems


def even_pair() -> Bandit:
    """Return the problem that uses the bound up as the learning rate goes to 0: two equal words, one is right."""
    return bandit(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))


def partings(n: int = 8, seed: int = 0) -> tuple[Parting, ...]:
    """Return, for every delta, rate, number of updates and staleness, the worst of n random problems and the pair."""
    generator = torch.Generator().manual_seed(seed)
    problems = [even_pair(), *some_problems(n, seed)]
    rows = []
    for delta in DELTAS:
        for rate in RATES:
            for updates in UPDATES:
                for staleness in STALENESS:
                    cases = [
                        part(p, stale_start(p, delta, rate, staleness, generator), delta, rate, updates, staleness)
                        for p in problems
                    ]
                    rows.append(worst(cases))
    return tuple(rows)


def worst(cases: Sequence[Parting]) -> Parting:
    """Return the largest of each figure over cases; the bounds are those of the case that parts farthest."""
    at = max(cases, key=lambda c: c.tv)
    return Parting(
        at.delta, at.rate, at.updates, at.staleness, max(c.logits for c in cases), max(c.tv for c in cases), at.bound,
        at.bound_tv, at.used, max(c.used_measured for c in cases), max(c.weight for c in cases),
    )  # fmt: skip
