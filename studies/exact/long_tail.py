"""Two long-tailed problems: one whose tail is noise, one whose tail holds the best word.

Which objectives learn, and how noisy they are.

Half of the sampler's mass lies in eight frequent words, half in hundreds with mu = 0.001 each. Both problems are exact:
gradients and their variances are sums over all words. The only random numbers are the coins of the noisy tail.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.objectives import REGISTRY, Objective
from drpo.spec import format_spec
from exact.bandit import Bandit, bandit, distance, estimate, value, value_gradient
from exact.drift import tilted

HEAD, TAIL = 8, 500
"""Frequent words, of mu = 1/16 each, and rare ones, of mu = 1/1000 each."""

COINS = 4
"""Contexts: each has its own coins, and the figures are means over them."""


@dataclass(frozen=True)
class Training:
    """How rollouts and updates follow each other.

    Args:
        rounds: rollouts; each begins with mu = pi and new coins.
        updates: per rollout.
        step: what an update moves a logit by, at most.
        batch: draws averaged over in an update; the more, the less the step is shortened by noise.
    """

    rounds: int = 15
    updates: int = 16
    step: float = 0.1
    batch: int = 1024


def _half_in_the_tail() -> Tensor:
    return torch.tensor([0.5 / HEAD] * HEAD + [0.5 / TAIL] * TAIL, dtype=torch.float64)


def noisy_tail() -> Bandit:
    """Return the problem whose tail is noise: half of the head is right, half wrong, a rare word's reward is a coin."""
    right = torch.zeros(HEAD + TAIL, dtype=torch.float64)
    right[:HEAD], right[: HEAD // 2] = 0.4, 0.6
    coin = torch.arange(HEAD + TAIL) >= HEAD
    lucky = torch.where(coin, 1.0, right).repeat(COINS, 1)
    unlucky = torch.where(coin, 0.0, right).repeat(COINS, 1)
    return bandit(_half_in_the_tail().repeat(COINS, 1), torch.stack([lucky, unlucky]))


def meaningful_tail() -> Bandit:
    """Return the problem whose best word is rare: it earns 1, the head 0.5, the rest of the tail nothing."""
    reward = torch.zeros(HEAD + TAIL, dtype=torch.float64)
    reward[:HEAD], reward[HEAD] = 0.5, 1.0
    return bandit(_half_in_the_tail(), reward)


def resampled(problem: Bandit, logits: Tensor) -> Bandit:
    """Return the problem with the policy for its sampler."""
    return bandit(torch.softmax(logits, -1), problem.reward, problem.chance, problem.context)


def frozen(problem: Bandit, generator: torch.Generator) -> Bandit:
    """Return what one large batch says of the problem: every word as often as mu has it, each with one outcome.

    All draws of a word share its outcome, as they do where a rare word is drawn once and trained on many times.
    """
    drawn = torch.rand(problem.chance.shape[1:], generator=generator, dtype=torch.float64)
    outcome = (drawn >= problem.chance.cumsum(0)).sum(0).clamp(max=len(problem.chance) - 1)
    reward = problem.reward.gather(0, outcome[None])
    return bandit(problem.behavior_logp.exp(), reward, context=problem.context)


def learn(objective: Objective, problem: Bandit, training: Training, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the true value of the policy after each round, and how far each round moved it, [rounds + 1] and [rounds].

    An update is Adam's without memory, with its moments exact for a batch of B draws:

        logits -= step * E[G] / sqrt(E[G]^2 + Var[G] / B)

    Args:
        objective: any.
        problem: what is true; every round trains on its `frozen` outcomes.
        training: how long.
        seed: of the coins; the same for every objective.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = problem.behavior_logp
    values, moved = [value(problem, logits).mean()], []
    for _ in range(training.rounds):
        batch = frozen(resampled(problem, logits), generator)
        for _ in range(training.updates):
            gradient = estimate(objective, batch, logits)
            scale = (gradient.mean.square() + gradient.variance.clamp(min=0) / training.batch).sqrt()
            logits = logits - training.step * torch.where(scale > 0, gradient.mean / scale, 0)
            logits = logits - logits.logsumexp(-1, keepdim=True)
        values.append(value(problem, logits).mean())
        moved.append(torch.tensor(distance(batch, logits).tv, dtype=torch.float64))
    return torch.stack(values), torch.stack(moved)


@dataclass(frozen=True)
class Learnt:
    """How an objective learns one of the problems.

    Args:
        objective: its spec.
        value: true expected reward after 0, 1, .. rounds.
        tv: total variation that each round moves the policy by.
    """

    objective: str
    value: tuple[float, ...]
    tv: tuple[float, ...]

    def reached(self, level: float) -> int | None:
        """First round after which the value is at least `level`; None where it never is."""
        return next((i for i, v in enumerate(self.value) if v >= level), None)


def learning(
    objectives: Sequence[Objective], problem: Bandit, training: Training | None = None, seed: int = 0
) -> tuple[Learnt, ...]:
    """Return how each objective learns the problem."""
    results = []
    for objective in objectives:
        values, tv = learn(objective, problem, training or Training(), seed)
        results.append(Learnt(format_spec(objective, REGISTRY), tuple(values.tolist()), tuple(tv.tolist())))
    return tuple(results)


@dataclass(frozen=True)
class Staleness:
    """How objectives learn a problem with so many updates per rollout.

    Args:
        updates: per rollout.
        learnt: one per objective.
    """

    updates: int
    learnt: tuple[Learnt, ...]


def staleness(
    objectives: Sequence[Objective], problem: Bandit, updates: Sequence[int], seed: int = 0
) -> tuple[Staleness, ...]:
    """Return how each objective learns the problem in as many rollouts, with more and more updates on each."""
    return tuple(Staleness(n, learning(objectives, problem, Training(updates=n), seed)) for n in updates)


@dataclass(frozen=True)
class Noise:
    """How many draws it takes to see where to go.

    Args:
        objective: its spec.
        tv: how far the policy has moved.
        cosine: between the expected step and the true gradient.
        draws: N at which the standard deviation of the mean of N gradients is as long as the part of the expected step
            along the true gradient; infinite where the expected step is none, or leads away.
    """

    objective: str
    tv: float
    cosine: float
    draws: float


def noise(
    objectives: Sequence[Objective], problem: Bandit, direction: Tensor, tvs: Sequence[float]
) -> tuple[Noise, ...]:
    """Return each objective's signal and noise at some distances from the sampler.

        N = trace(Cov[G]) / s^2,   s = -E[G] . true / |true|

    Args:
        objectives: any.
        problem: with all its outcomes: a draw's own luck is part of the noise.
        direction: [C, V]; the policy is on the path `tilted` by it.
        tvs: total variations.
    """
    results = []
    for tv in tvs:
        logits = tilted(problem, direction, tv)
        true = value_gradient(problem, logits)
        for objective in objectives:
            gradient = estimate(objective, problem, logits)
            along = -float((gradient.mean * true).sum() / true.norm())
            size = float(gradient.mean.norm())
            draws = gradient.trace / along**2 if along > 1e-12 else float("inf")
            results.append(Noise(format_spec(objective, REGISTRY), tv, along / size if size > 1e-12 else 0.0, draws))
    return tuple(results)


def memorising(problem: Bandit, seed: int = 0) -> Tensor:
    """Return the direction, [C, V], in which a policy goes that believes one batch: its advantages."""
    return frozen(problem, torch.Generator().manual_seed(seed)).advantage[0]


def best_word(problem: Bandit) -> Tensor:
    """Return the direction, [C, V], in which the best word alone rises."""
    return torch.nn.functional.one_hot(problem.worth.argmax(-1), problem.worth.shape[-1]).double()
