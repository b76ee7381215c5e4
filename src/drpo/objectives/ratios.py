"""Ratios and differences of the probabilities pi and mu of sampled tokens, in float32 or wider, without overflow."""

import torch
from torch import Tensor

from drpo.types import Tokens

MAX_LOG_RATIO = 20.0
"""Ratios are e^min(logp - behavior_logp, 20); the trainer counts tokens beyond as `ratio_capped`."""

LOWEST_LOGP = -1e30
"""Replaces log 0 = -inf, so that no difference or product of logarithms is NaN. Ratios become their limits: r = 0 where
pi = 0, r = e^20 where mu = 0, and r = 1 where both are 0."""


def wide(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Return `logp`, `behavior_logp`, `advantage` in float32, or float64 if they are; -inf becomes `LOWEST_LOGP`."""

    def widen(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else values.float()

    logp, behavior_logp = (widen(x).clamp(min=LOWEST_LOGP) for x in (tokens.logp, tokens.behavior_logp))
    return logp, behavior_logp, widen(tokens.advantage)


def log_ratio(tokens: Tokens) -> Tensor:
    """Return logp - behavior_logp, [T], finite: 0 where both probabilities are 0, beyond +-1e29 where one is."""
    logp, behavior_logp, _ = wide(tokens)
    return logp - behavior_logp


def ratio(tokens: Tokens) -> Tensor:
    """Return r = pi / mu = e^min(logp - behavior_logp, 20), [T]; never infinite."""
    return torch.exp(log_ratio(tokens).clamp(max=MAX_LOG_RATIO))


def prob_diff(tokens: Tokens, power: float = 0.0) -> Tensor:
    """Return D / mu^power, D = pi - mu, [T], without cancellation where pi is near mu and without overflow.

        D / mu^q = sign(l - m) * e^(max(l, m) - q m) * (1 - e^-|l - m|)

    With q = 0 the result is D, in [-1, 1]; with q = 1 it is r - 1. The exponent is capped at 20, as in the ratio.
    """
    logp, behavior_logp, _ = wide(tokens)
    difference = logp - behavior_logp
    scale = torch.exp((torch.maximum(logp, behavior_logp) - power * behavior_logp).clamp(max=MAX_LOG_RATIO))
    return -difference.sign() * scale * torch.expm1(-difference.abs())
