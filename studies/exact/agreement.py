"""Compares the exact gradients with automatic differentiation, and with a million draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.objectives import CISPO, REGISTRY, ImportanceSampling, Objective, Tokens, gradient
from drpo.spec import format_spec
from exact.bandit import Bandit, Estimate, bandit, estimate, seen, surrogate, zipf


def by_autograd(objective: Objective, problem: Bandit, logits: Tensor) -> Tensor:
    """Return the gradient of the expected loss by automatic differentiation, [C, V]."""
    leaf = logits.detach().requires_grad_()
    (slope,) = torch.autograd.grad(surrogate(objective, problem, leaf), leaf)
    return slope


def draw(problem: Bandit, draws: int, seed: int) -> Tensor:
    """Return the indices of the sampled draws, of the K * C * V that are possible, [draws] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(problem.distribution.reshape(-1), draws, replacement=True, generator=generator)


def by_sampling(objective: Objective, problem: Bandit, logits: Tensor, drawn: Tensor) -> Estimate:
    """Return mean and variance of one draw's gradient over what was `drawn`.

    The objective sees every draw by itself, as a trainer would show it.
    """
    logp = torch.log_softmax(logits, -1)
    pi, n = logp.exp(), len(drawn)
    columns = {name: None if x is None else x[drawn] for name, x in vars(seen(objective, problem, logp)).items()}
    g = gradient(objective, Tokens(**columns | {"sequence": torch.arange(n)}))  # type: ignore[arg-type]
    word = drawn % pi.numel()
    h, s = (torch.bincount(word, weights=x, minlength=pi.numel()).reshape(pi.shape) / n for x in (g, g.square()))
    mean = h - pi * h.sum(-1, keepdim=True)
    second = s * (1 - 2 * pi) + pi.square() * s.sum(-1, keepdim=True)
    return Estimate(mean, second - mean.square())


def z_scores(exact: Estimate, sampled: Estimate, draws: int) -> Tensor:
    """Return how many standard errors each coordinate of the sampled mean is from the exact one, [C, V]."""
    return (sampled.mean - exact.mean) / (exact.variance / draws).sqrt()


@dataclass(frozen=True)
class Agreement:
    """An objective's exact gradient, compared with automatic differentiation and with sampling.

    Args:
        objective: its spec.
        autograd: largest difference from automatic differentiation.
        z: largest |z| over all coordinates of the sampled mean.
        variance: sampled trace of the covariance over the exact one.
    """

    objective: str
    autograd: float
    z: float
    variance: float


def crowd(vocab_size: int = 25, seed: int = 0) -> tuple[Bandit, Tensor]:
    """Return two contexts over a long tail with random rewards of two outcomes, and a policy that has moved."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(2, 2, vocab_size, generator=generator, dtype=torch.float64)
    problem = bandit(zipf(vocab_size).repeat(2, 1), reward, context=torch.tensor([0.3, 0.7]))
    noise = torch.randn(2, vocab_size, generator=generator, dtype=torch.float64)
    return problem, problem.behavior_logp + noise


def agreement(objectives: Sequence[Objective], draws: int = 1_000_000, seed: int = 0) -> tuple[Agreement, ...]:
    """Return how well exact, automatic and sampled gradients agree, off-policy; one row per objective."""
    problem, logits = crowd()
    drawn = draw(problem, draws, seed)
    rows = []
    for objective in objectives:
        exact = estimate(objective, problem, logits)
        sampled = by_sampling(objective, problem, logits, drawn)
        automatic = by_autograd(objective, problem, logits)
        z = z_scores(exact, sampled, draws).abs().max()
        rows.append(
            Agreement(
                format_spec(objective, REGISTRY),
                float((automatic - exact.mean).abs().max()),
                float(z),
                sampled.trace / exact.trace,
            )
        )
    return tuple(rows)


def mistaken(draws: int = 1_000_000, seed: int = 0) -> float:
    """Return the largest |z| of an estimator that forgets the ratio, compared with the exact surrogate's gradient."""
    problem, logits = crowd()
    forgetful = by_sampling(CISPO(0.0, 0.0), problem, logits, draw(problem, draws, seed))  # clip(r, 1, 1) = 1
    return float(z_scores(estimate(ImportanceSampling(), problem, logits), forgetful, draws).abs().max())
