"""A policy over V words, one softmax per context; every expectation is a sum over all words, and nothing is sampled.

Shapes: C contexts, V words, K outcomes (what a word may earn). All float64. A draw is a context by its share, then a
word from the sampler's distribution mu, then an outcome by its chance; the advantage is its reward less a baseline: the
context's mean reward under mu, which is what a group's mean tends to, unless another is given. One draw's gradient in
the logits is

    G = g (e_word - pi),   g = d loss / d logp,

in its context's row, so that mean and covariance of G are finite sums. A draw is a sequence of its own: sequence-level
objectives see sequences of one token (`exact.texts` has longer ones); top-K divergences are those of the whole
distribution (K = V). The score is the reward, the proximal policy is half-way in log-probability, and statistics of the
batch are those of a batch with all draws in proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives import TOPK, Objective, Tokens, gradient, needed_divergence, reads_batch
from exact.batches import between, proportional, with_statistics


@dataclass(frozen=True, eq=False)
class Bandit:
    """The sampler's distribution and the rewards; `bandit` builds and checks it.

    Args:
        behavior_logp: [C, V] log mu, nats, the sampler's; every row a distribution.
        reward: [K, C, V]; what outcome k of a word earns.
        chance: [K, C, V] >= 0; of each outcome, given the word; sums to 1 over K.
        context: [C] > 0; share of each context; sums to 1.
        baseline: [C]; what the advantage is counted from.
    """

    behavior_logp: Tensor
    reward: Tensor
    chance: Tensor
    context: Tensor
    baseline: Tensor

    @cached_property
    def distribution(self) -> Tensor:
        """[K, C, V]: probability of drawing this context, word and outcome."""
        return self.context[:, None] * self.behavior_logp.exp() * self.chance

    @cached_property
    def worth(self) -> Tensor:
        """[C, V]: mean reward of each word."""
        return (self.chance * self.reward).sum(0)

    @cached_property
    def advantage(self) -> Tensor:
        """[K, C, V]: reward less the context's baseline."""
        return self.reward - self.baseline[:, None]

    @cached_property
    def on_policy(self) -> Tokens:
        """All K * C * V draws that there are, as an objective sees them where pi = mu."""
        logp = self.behavior_logp.expand(self.reward.shape).reshape(-1)
        n = len(logp)
        keep, score = torch.ones(n, dtype=torch.bool), self.reward.reshape(n)
        return Tokens(logp, logp, self.advantage.reshape(n), keep, torch.arange(n), score=score)

    def tokens(self, logp: Tensor) -> Tokens:
        """The same with the policy's `logp` [C, V]."""
        return between(replace(self.on_policy, logp=logp.expand(self.reward.shape).reshape(-1)))

    def fixed(self, objective: Objective, tokens: Tokens) -> Objective:
        """Return the objective with the statistics of the whole batch, if it reads any."""
        if not reads_batch(objective):
            return objective
        return with_statistics(objective, tokens, proportional(self.distribution.reshape(-1)))


def bandit(
    mu: Tensor,
    reward: Tensor,
    chance: Tensor | None = None,
    context: Tensor | None = None,
    baseline: float | None = None,
) -> Bandit:
    """Return the bandit with these distributions and rewards.

    Args:
        mu: [V] or [C, V], > 0; rows sum to 1.
        reward: [V], [C, V] or [K, C, V], finite.
        chance: [K, C, V] >= 0, of each outcome; None is one outcome, or equal chances.
        context: [C] > 0, summing to 1; None is equal shares.
        baseline: what advantages are counted from; None is each context's mean reward under mu.

    Raises:
        InputError: shapes that do not fit, or what should be a distribution and is none.

    Example:
        >>> b = bandit(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.0, 1.0]))
        >>> b.advantage[0, 0]
        tensor([-0.2000, -0.2000,  0.8000], dtype=torch.float64)
    """
    mu, reward = torch.atleast_2d(mu).double(), reward.double().reshape(-1, *_rows(reward))
    if mu.shape != reward.shape[1:]:
        raise InputError(f"mu {list(mu.shape)} and reward {list(reward.shape)}: both must be of the same words")
    if not bool(torch.isfinite(reward).all()):
        raise InputError("reward: must be finite")
    k, c, _ = reward.shape
    mu = _distribution("mu", mu, mu.shape, -1)
    chance = _distribution("chance", torch.full_like(reward, 1 / k) if chance is None else chance, reward.shape, 0)
    context = _distribution("context", torch.full((c,), 1 / c) if context is None else context, torch.Size([c]), -1)
    if not bool((mu > 0).all() and (context > 0).all()):
        raise InputError("mu and context: no probability may be 0")
    mean = (mu * (chance * reward).sum(0)).sum(-1)
    return Bandit(mu.log(), reward, chance, context, mean if baseline is None else torch.full_like(mean, baseline))


def _distribution(name: str, given: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The same in float64 and to rounding of 1, where it is a distribution along the axis."""
    distribution = given.double()
    if distribution.shape != shape:
        raise InputError(f"{name} {list(distribution.shape)}: must be {list(shape)}")
    total = distribution.sum(axis, keepdim=True)
    if not bool((distribution >= 0).all() and ((total - 1).abs() < 1e-5).all()):
        raise InputError(f"{name}: must be probabilities that sum to 1, not to {total.flatten()[0].item():g}")
    return distribution / total


def _rows(reward: Tensor) -> Sequence[int]:
    return tuple(reward.shape[-2:]) if reward.ndim > 1 else (1, len(reward))


def zipf(vocab_size: int, exponent: float = 1.0, offset: float = 2.0) -> Tensor:
    """Return a long-tailed distribution, mu_i proportional to 1 / (i + offset)^exponent, [V] float64, falling.

    Example:
        >>> zipf(4)
        tensor([0.3896, 0.2597, 0.1948, 0.1558], dtype=torch.float64)
    """
    mass = (torch.arange(vocab_size, dtype=torch.float64) + offset) ** -exponent
    return mass / mass.sum()


def value(problem: Bandit, logits: Tensor) -> Tensor:
    """Return the expected reward of the policy per context, [C].

        J_c = sum_y pi(y) worth(y)

    Args:
        problem: a bandit.
        logits: [C, V] of the policy.
    """
    return (torch.softmax(logits, -1) * problem.worth).sum(-1)


def value_gradient(problem: Bandit, logits: Tensor) -> Tensor:
    """Return the true policy gradient, d J / d logits, [C, V], J the mean of `value` over contexts.

    share_c pi(y) (worth(y) - J_c)
    """
    pi = torch.softmax(logits, -1)
    return problem.context[:, None] * pi * (problem.worth - value(problem, logits)[:, None])


@dataclass(frozen=True, eq=False)
class Estimate:
    """Mean and variance, over one draw from the sampler, of an objective's gradient in the logits.

    Args:
        mean: [C, V] of G; training descends it.
        variance: [C, V] of each coordinate of G; divided by N where N draws are averaged.
    """

    mean: Tensor
    variance: Tensor

    @property
    def trace(self) -> float:
        """Trace of the covariance of one draw's gradient."""
        return float(self.variance.sum())


def estimate(objective: Objective, problem: Bandit, logits: Tensor) -> Estimate:
    """Return the exact mean and variance of one draw's gradient.

        E[G] = h - pi sum(h),                h = sum_k distribution g
        E[G_y^2] = s_y (1 - 2 pi_y) + pi_y^2 sum(s),   s = sum_k distribution g^2

    Args:
        objective: any.
        problem: a bandit.
        logits: [C, V] of the policy now.

    Example:
        >>> from drpo.objectives import ImportanceSampling
        >>> b = bandit(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.0, 1.0]))
        >>> logits = torch.zeros(1, 3, dtype=torch.float64)
        >>> result = estimate(ImportanceSampling(), b, logits)  # unbiased, however far pi is from mu
        >>> torch.allclose(-result.mean, value_gradient(b, logits))
        True
    """
    logp = torch.log_softmax(logits, -1)
    pi, distribution, g = logp.exp(), problem.distribution, slopes(objective, problem, logp)
    h, s = (distribution * g).sum(0), (distribution * g.square()).sum(0)
    mean = h - pi * h.sum(-1, keepdim=True)
    second = s * (1 - 2 * pi) + pi.square() * s.sum(-1, keepdim=True)
    return Estimate(mean, second - mean.square())


def slopes(objective: Objective, problem: Bandit, logp: Tensor) -> Tensor:
    """Return g = d loss / d logp of every draw, [K, C, V], for the policy's `logp` [C, V]."""
    tokens = seen(objective, problem, logp)
    return gradient(problem.fixed(objective, tokens), tokens).reshape(problem.reward.shape)


def seen(objective: Objective, problem: Bandit, logp: Tensor) -> Tokens:
    """Return all draws as the objective sees them, [K C V], with the exact divergence where it reads one."""
    tokens, kind = problem.tokens(logp), needed_divergence(objective.needs)
    if kind is None:
        return tokens
    moved = TOPK[kind](logp.detach(), problem.behavior_logp)[:, None].expand(problem.reward.shape)
    return replace(tokens, divergence=moved.reshape(-1))


def surrogate(objective: Objective, problem: Bandit, logits: Tensor) -> Tensor:
    """Return the expected loss under the sampler, a scalar, differentiable in `logits` [C, V]."""
    tokens = seen(objective, problem, torch.log_softmax(logits, -1))
    loss = problem.fixed(objective, tokens)(tokens).loss
    expected: Tensor = (problem.distribution.reshape(-1) * loss).sum()
    return expected


def covariance(objective: Objective, problem: Bandit, logits: Tensor) -> Tensor:
    """Return the covariance of one draw's gradient, [C V, C V]; for few words: it is a sum of outer products."""
    logp = torch.log_softmax(logits, -1)
    pi, g, distribution = logp.exp(), slopes(objective, problem, logp), problem.distribution
    c, v = pi.shape
    s = (distribution * g.square()).sum(0)
    blocks = torch.diag_embed(s) - s[:, :, None] * pi[:, None] - pi[:, :, None] * s[:, None]
    blocks = blocks + s.sum(-1)[:, None, None] * pi[:, :, None] * pi[:, None]
    mean = estimate(objective, problem, logits).mean.reshape(c * v)
    second: Tensor = torch.block_diag(*blocks)
    return second - mean[:, None] * mean


@dataclass(frozen=True)
class Distance:
    """How far pi is from mu, in the mean over contexts.

    Args:
        tv: total variation, sum |pi - mu| / 2, in [0, 1].
        kl: KL(mu || pi), nats.
        reverse_kl: KL(pi || mu), nats.
        chi_square: sum (pi - mu)^2 / mu.
        squared_l2: sum (pi - mu)^2.
    """

    tv: float
    kl: float
    reverse_kl: float
    chi_square: float
    squared_l2: float


def distance(problem: Bandit, logits: Tensor) -> Distance:
    """Return how far the policy is from the sampler.

    Example:
        >>> b = bandit(torch.tensor([0.5, 0.5]), torch.zeros(2))
        >>> result = distance(b, torch.tensor([[0.75, 0.25]]).double().log())
        >>> round(result.tv, 6), round(result.chi_square, 6), round(result.squared_l2, 6)
        (0.25, 0.25, 0.125)
    """
    logp = torch.log_softmax(logits, -1)
    pi, mu, log_ratio = logp.exp(), problem.behavior_logp.exp(), logp - problem.behavior_logp
    moved = pi - mu

    def mean(values: Tensor) -> float:
        return float(problem.context @ values.sum(-1))

    return Distance(
        tv=mean(moved.abs() / 2),
        kl=mean(-mu * log_ratio),
        reverse_kl=mean(pi * log_ratio),
        chi_square=mean(moved.square() / mu),
        squared_l2=mean(moved.square()),
    )


@dataclass(frozen=True)
class Bias:
    """An objective's expected step beside the true gradient of the value at the policy it is taken from.

    Args:
        relative: |step - true| / |true|; 0 for an unbiased one.
        cosine: between them.
    """

    relative: float
    cosine: float


def bias(objective: Objective, problem: Bandit, logits: Tensor) -> Bias:
    """Return how far the expected step -E[G] is from the true policy gradient at `logits` [C, V]."""
    step, true = -estimate(objective, problem, logits).mean, value_gradient(problem, logits)
    size = torch.linalg.vector_norm
    cosine = (step * true).sum() / (size(step) * size(true)).clamp(min=torch.finfo(torch.float64).tiny)
    return Bias(float(size(step - true) / size(true)), float(cosine))


def descend(objective: Objective, problem: Bandit, logits: Tensor, learning_rate: float, updates: int) -> Tensor:
    """Return the logits after 0, 1, .. updates of gradient descent on the expected loss, [updates + 1, C, V].

    Deterministic: logits -= learning_rate * E[G]; the sampler stays what it was.
    """
    path = [logits]
    for _ in range(updates):
        path.append(path[-1] - learning_rate * estimate(objective, problem, path[-1]).mean)
    return torch.stack(path)
