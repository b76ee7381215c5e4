"""All texts of three words: objectives of sequences, exactly.

A policy is a softmax over V words for each of the 1 + V + V^2 prefixes; a draw is a text by the sampler's distribution,
and earns a reward. Its advantage is the reward less the mean under the sampler, the same for its three tokens. With
g_t = d loss / d logp of token t, one draw's gradient is

    G = sum_t g_t (e_word - pi(prefix_t))  in the row of its prefix,

and mean and covariance are sums over all V^3 texts. The true gradient is that of sum_y pi(y) R(y).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives import REGISTRY, Objective, Tokens, gradient
from drpo.spec import format_spec
from exact.batches import between, proportional, with_statistics

WORDS, LENGTH = 4, 3
TVS = (0.0, 0.01, 0.1, 0.3)
"""Total variations of the distributions of texts."""


@dataclass(frozen=True, eq=False)
class Texts:
    """The sampler and the rewards.

    Args:
        logits: [P, V] of the sampler, one row per prefix, shorter ones first.
        reward: [V^3], of the texts in the order of their words.
    """

    logits: Tensor
    reward: Tensor

    @cached_property
    def words(self) -> Tensor:
        """[V^3, 3] the words of each text."""
        v = self.logits.shape[1]
        return torch.cartesian_prod(*[torch.arange(v)] * LENGTH)

    @cached_property
    def prefix(self) -> Tensor:
        """[V^3, 3] the row of each token's prefix."""
        v = self.logits.shape[1]
        rows, at = [], torch.zeros(len(self.words), dtype=torch.int64)
        first = 0
        for t in range(LENGTH):
            rows.append(first + at)
            first, at = first + v**t, at * v + self.words[:, t]
        return torch.stack(rows, 1)

    def logp(self, logits: Tensor) -> Tensor:
        """Return the log-probability of each token of each text, [V^3, 3], under a policy's logits [P, V]."""
        return torch.log_softmax(logits, -1)[self.prefix, self.words]

    @cached_property
    def mu(self) -> Tensor:
        """[V^3] the sampler's distribution of texts."""
        return self.logp(self.logits).sum(1).exp()

    @cached_property
    def advantage(self) -> Tensor:
        """[V^3]."""
        return self.reward - (self.mu * self.reward).sum()

    def tokens(self, logits: Tensor) -> Tokens:
        """Return the 3 V^3 tokens of all texts, as an objective sees them; the proximal policy is half-way."""
        n = len(self.words)

        def each(values: Tensor) -> Tensor:
            return values[:, None].expand(n, LENGTH).reshape(-1)

        sequence = each(torch.arange(n))
        tokens = Tokens(
            self.logp(logits).reshape(-1),
            self.logp(self.logits).reshape(-1),
            each(self.advantage),
            torch.ones(n * LENGTH, dtype=torch.bool),
            sequence,
            position=torch.arange(LENGTH).repeat(n),
            score=each(self.reward),
        )
        return between(tokens)

    def spread(self, slopes: Tensor, logits: Tensor) -> Tensor:
        """Return one draw's gradient in the logits for each text, [V^3, P V], given g [V^3, 3]."""
        p, v = logits.shape
        pi = torch.softmax(logits, -1)
        out = torch.zeros(len(self.words), p, v, dtype=torch.float64)
        index = torch.arange(len(self.words))
        for t in range(LENGTH):
            row = self.prefix[:, t]
            out[index, row] -= slopes[:, t, None] * pi[row]
            out[index, row, self.words[:, t]] += slopes[:, t]
        return out.reshape(len(self.words), p * v)

    def value_gradient(self, logits: Tensor) -> Tensor:
        """Return the true gradient of the expected reward, [P V]."""
        pi = self.logp(logits).sum(1).exp()
        ahead = self.reward - (pi * self.reward).sum()
        return pi @ self.spread(ahead[:, None].expand(-1, LENGTH), logits)


def some_texts(seed: int = 0) -> Texts:
    """Return texts of uneven words; the rewards are normal, so about half of the texts are successes."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = sum(WORDS**t for t in range(LENGTH))
    logits = torch.randn(prefixes, WORDS, generator=generator, dtype=torch.float64)
    return Texts(logits, torch.randn(WORDS**LENGTH, generator=generator, dtype=torch.float64))


def total_variation(texts: Texts, logits: Tensor) -> float:
    """Return the total variation between the policy's and the sampler's texts."""
    return float((texts.logp(logits).sum(1).exp() - texts.mu).abs().sum() / 2)


def tilted(texts: Texts, tv: float) -> Tensor:
    """Return the policy's logits that far along the true gradient, by bisection.

    Raises:
        InputError: the path ends before it is that far.
    """
    way = texts.value_gradient(texts.logits).reshape(texts.logits.shape)
    low, high = 0.0, 1.0
    while total_variation(texts, texts.logits + high * way) < tv:
        high *= 2
        if high > 1e6:
            raise InputError(f"tv={tv}: no policy on the path is that far from the sampler")
    for _ in range(60 if tv else 0):
        middle = (low + high) / 2
        near = total_variation(texts, texts.logits + middle * way) < tv
        low, high = (middle, high) if near else (low, middle)
    return texts.logits + low * way


@dataclass(frozen=True)
class OfTexts:
    """An objective's expected gradient beside the true one, and its noise.

    Args:
        objective: its spec.
        tv: total variation of texts.
        relative: |expected step - true| / |true|.
        cosine: between them.
        draws: texts whose mean gradient has noise as large as its part along the true gradient; infinite where the
            expected step leads away.
    """

    objective: str
    tv: float
    relative: float
    cosine: float
    draws: float


def of_texts(objective: Objective, texts: Texts, logits: Tensor) -> tuple[Tensor, float]:
    """Return the expected gradient, [P V], and the trace of one draw's covariance, exactly."""
    tokens = texts.tokens(logits)
    counts = proportional(texts.mu).repeat_interleave(LENGTH)
    slopes = gradient(with_statistics(objective, tokens, counts), tokens).reshape(-1, LENGTH)
    each = texts.spread(slopes, logits)
    mean = texts.mu @ each
    return mean, float(texts.mu @ each.square().sum(1) - mean.square().sum())


def texts_bias(
    objectives: Sequence[Objective], texts: Texts | None = None, tvs: Sequence[float] = TVS
) -> tuple[OfTexts, ...]:
    """Return bias and noise of each objective at some distances from the sampler."""
    texts = texts or some_texts()
    rows = []
    for tv in tvs:
        logits = tilted(texts, tv)
        true = texts.value_gradient(logits)
        for objective in objectives:
            mean, trace = of_texts(objective, texts, logits)
            along, size = -float(mean @ true / true.norm()), float(mean.norm())
            rows.append(
                OfTexts(
                    format_spec(objective, REGISTRY),
                    tv,
                    float((mean + true).norm() / true.norm()),
                    along / size if size > 1e-12 else 0.0,
                    trace / along**2 if along > 1e-12 else float("inf"),
                )
            )
    return tuple(rows)
