"""DRPO-Eff: DRPO with a bounded map of the policy's movement in place of the ratio."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require, require_one_of
from drpo.objectives.closed_form import token_loss
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, prob_diff, wide
from drpo.types import TokenLoss, Tokens

SMALLEST = 1e-8
"""Least divisor of a movement."""


@dataclass(frozen=True)
class DRPOEff:
    """DRPO with an effective ratio e, a map of the movement z that is bounded to [low, high] and 1 at pi = mu.

        loss = l sg(-A e + |A| mu e (e - 1) / delta)     w = (e / r) (1 - sign(A) mu (e - 1) / delta)

        none            e = r, which has DRPO's gradient
        clip            e = clip(r, low, high)
        log_tanh        log e = U tanh(beta x+ / U) - L tanh(beta x- / L),   U = log high, L = -log low; low = 0: -x-
        power           e = clip(r^alpha, low, high)
        mass_power      e = clip(r^(mu / (mu + mass)), low, high)
        residual_sech   e = clip(1 + (r - 1) / cosh(x / beta)^2, low, high)
        sigmoid_bound   e = low + (high - low) sigmoid(beta z + c),   c such that e = 1 at z = 0
        tanh_bound      e = 1 + (high - 1) tanh(beta z+ / (high - 1)) - (1 - low) tanh(beta z- / (1 - low))

    x = l - m; y+ and y- are the positive parts of y and -y. The two last maps read a movement z: x ("log_ratio"), r - 1
    ("ratio_delta"), pi - mu ("prob_diff"), (pi - mu)/(1 - pi) ("bkl_grad"), (pi - mu)/sqrt(mu (1 - mu)) ("fisher").

    The coefficient is bounded, which DRPO's r w is not. The penalty fades where e does: a rare token that has vanished
    is no longer pulled back. The loss's value means nothing; only gradients compare.

    Args:
        delta: > 0, in units of probability.
        map: one of the eight.
        metric: the movement, for the two last maps.
        low: in [0, 1).
        high: > 1.
        beta: > 0, steepness.
        alpha: in (0, 1], of "power".
        mass: > 0, in units of probability, of "mass_power".
        metric_clip: > 0, bound of |z|, or None.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range, or a movement that the map does not read.

    Example:
        >>> DRPOEff(0.2).map
        'log_tanh'

    Source: the package `verl_drpo_plugin`, its loss "drpo_eff" (its `drpo_epsilon` is delta); no paper.
    """

    delta: float = 12.5
    map: str = "log_tanh"
    metric: str = "log_ratio"
    low: float = 0.0
    high: float = 2.0
    beta: float = 1.0
    alpha: float = 0.5
    mass: float = 1e-4
    metric_clip: float | None = None
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)
        require_one_of("map", self.map, tuple(_MAPS))
        require_one_of("metric", self.metric, tuple(_MOVEMENTS))
        if self.metric != "log_ratio" and self.map not in BOUNDED:
            raise InputError(f"metric={self.metric!r}: the map {self.map!r} reads the log-ratio alone; leave it out")
        require("low", self.low, above=0, below=1, closed=True)
        if self.low == 1:
            raise InputError(f"low={self.low!r} must be below 1, which is e at pi = mu")
        require("high", self.high, above=1)
        require("beta", self.beta, above=0)
        require("alpha", self.alpha, above=0)
        require("alpha", self.alpha, above=0, below=1, closed=True)
        require("mass", self.mass, above=0)
        if self.metric_clip is not None:
            require("metric_clip", self.metric_clip, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, behavior_logp, advantage = wide(tokens)
        effective, excess = _MAPS[self.map](self, tokens)
        if self.map in CLIPPED:
            effective, excess = effective.clamp(self.low, self.high), excess.clamp(self.low - 1, self.high - 1)
        pull = advantage.abs() * behavior_logp.exp() * excess / self.delta
        slope = effective * (pull - advantage)
        return token_loss(tokens, value=slope * logp, slope=slope)

    def movement(self, tokens: Tokens) -> Tensor:
        """Return z [T]."""
        z = _MOVEMENTS[self.metric](tokens)
        return z if self.metric_clip is None else z.clamp(-self.metric_clip, self.metric_clip)


def _near(tokens: Tokens) -> Tensor:
    """Return x = l - m, [T], at most 20."""
    return log_ratio(tokens).clamp(max=MAX_LOG_RATIO)


def _bkl_grad(tokens: Tokens) -> Tensor:
    return prob_diff(tokens) / (-torch.expm1(wide(tokens)[0])).clamp(min=SMALLEST)


def _fisher(tokens: Tokens) -> Tensor:
    mu = wide(tokens)[1].exp()
    return prob_diff(tokens) / (-mu * torch.expm1(wide(tokens)[1]) + SMALLEST).sqrt()


_MOVEMENTS: Mapping[str, Callable[[Tokens], Tensor]] = {
    "log_ratio": _near,
    "ratio_delta": lambda tokens: torch.expm1(_near(tokens)),
    "prob_diff": prob_diff,
    "bkl_grad": _bkl_grad,
    "fisher": _fisher,
}

# Each map returns e and e - 1, [T] both. Neither is computed from the other, which has no digits of it near 0.


def _of_log(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), torch.expm1(x)


def _raw(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    return _of_log(_near(tokens))


def _log_tanh(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    x, top = _near(tokens), math.log(method.high)
    risen, below = top * torch.tanh(method.beta * x.clamp(min=0) / top), (-x).clamp(min=0)
    if method.low:
        bottom = -math.log(method.low)
        below = bottom * torch.tanh(method.beta * below / bottom)
    return _of_log(risen - below)


def _power(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    return _of_log(method.alpha * _near(tokens))


def _mass_power(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    mu = wide(tokens)[1].exp()
    return _of_log(mu / (mu + method.mass) * _near(tokens))


def _residual_sech(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    x = _near(tokens)
    share = torch.cosh(x / method.beta).square().reciprocal()
    return x.exp() * share + torch.tanh(x / method.beta).square(), torch.expm1(x) * share


def _sigmoid_bound(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    room, y = method.high - method.low, method.beta * method.movement(tokens)
    at_one = (1 - method.low) / room
    effective = method.low + room * torch.sigmoid(y + math.log(at_one / (1 - at_one)))
    # sigmoid(y + c) - sigmoid(c), of the one sign of y and of the other.
    down, up = y.clamp(max=0), y.clamp(min=0)
    fallen = torch.expm1(down) / (at_one * down.exp() + 1 - at_one)
    risen = -torch.expm1(-up) / (at_one + (1 - at_one) * (-up).exp())
    return effective, room * at_one * (1 - at_one) * (fallen + risen)


def _tanh_bound(method: DRPOEff, tokens: Tokens) -> tuple[Tensor, Tensor]:
    z, above, below = method.movement(tokens), method.high - 1, 1 - method.low
    risen = above * torch.tanh(method.beta * z.clamp(min=0) / above)
    y = method.beta * (-z).clamp(min=0) / below
    return method.low + 2 * below * torch.sigmoid(-2 * y) + risen, risen - below * torch.tanh(y)


_MAPS: Mapping[str, Callable[[DRPOEff, Tokens], tuple[Tensor, Tensor]]] = {
    "none": _raw,
    "clip": _raw,
    "log_tanh": _log_tanh,
    "power": _power,
    "mass_power": _mass_power,
    "residual_sech": _residual_sech,
    "sigmoid_bound": _sigmoid_bound,
    "tanh_bound": _tanh_bound,
}
CLIPPED = ("clip", "power", "mass_power", "residual_sech")
"""The maps whose result is clipped to [low, high]."""
BOUNDED = ("sigmoid_bound", "tanh_bound")
"""The maps that read a movement."""
