"""Smooth quadratic trust regions: DRPO, SPO, and the DRPO paper's other penalties."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require, require_one_of
from drpo.objectives.closed_form import token_loss
from drpo.objectives.ratios import MAX_LOG_RATIO, prob_diff, ratio, wide
from drpo.types import TokenLoss, Tokens


@dataclass(frozen=True)
class DRPO:
    """Divergence Regularized Policy Optimization: the surrogate with an advantage-weighted quadratic in pi - mu.

        loss = -r A + |A| mu (r - 1)^2 / (2 delta)     w = 1 - sign(A) (pi - mu) / delta

    The weight decreases as the token's probability moves in the direction of its advantage. It is 0 at
    |pi - mu| = delta, the boundary of DPPO's Binary-TV region, and negative beyond: the token is pulled back, not
    masked. The weight is bounded, w in [1 - 1/delta, 1 + 1/delta]. For one token alone the fixed point is
    pi = mu + sign(A) delta.

    delta is a difference of probabilities. |pi - mu| <= 1, so with delta >= 1 no token can reach the boundary: at the
    paper's 12.5 every weight lies in [0.92, 1.08] and nothing is corrected. 12.5 is the default because the paper
    reports it; radii of 0.1 to 0.6 can be reached.

    Args:
        delta: radius of the region, > 0, in units of probability.
        power: q in [0, 1]; measures the difference as (pi - mu) / mu^q: penalty |A| mu^(1-q) (r - 1)^2 / (2 delta),
            weight w = 1 - sign(A) (pi - mu) / (delta mu^q). 0 is DRPO, 1 is SPO, 1/2 the Hellinger geometry. This
            family is drpo's own.
        outside: None, or a radius inside which (|pi - mu| <= outside) the penalty is off: the paper's Mask-DRPO.
        advantage_weighted: False drops |A| from the penalty (paper: unstable). Then a token with A = 0 has a gradient.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> DRPO(0.2)
        DRPO(delta=0.2, power=0.0, outside=None, advantage_weighted=True)

    Source: DRPO, arXiv 2606.09821, Eq. 8 and Table 1; `outside` and `advantage_weighted` are its ablations.
    """

    delta: float = 12.5
    power: float = 0.0
    outside: float | None = None
    advantage_weighted: bool = True
    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)
        require("power", self.power, above=0, below=1, closed=True)
        if self.outside is not None:
            require("outside", self.outside, above=0, closed=True)
        if not isinstance(self.advantage_weighted, bool):
            raise InputError(f"advantage_weighted={self.advantage_weighted!r} must be True or False")

    @property
    def vanishes_at_zero_advantage(self) -> bool:
        """False without |A| in the penalty, which then also acts on tokens with A = 0."""
        return self.advantage_weighted

    def __call__(self, tokens: Tokens) -> TokenLoss:
        penalised = None if self.outside is None else prob_diff(tokens).abs() > self.outside
        return _quadratic(tokens, self.delta, self.power, self.advantage_weighted, penalised)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: |pi - mu| > delta mu^power, where the weight is negative."""
        return prob_diff(tokens, self.power).abs() > self.delta


@dataclass(frozen=True)
class SPO:
    """Simple Policy Optimization: the surrogate with an advantage-weighted quadratic in the ratio.

        loss = -r A + |A| (r - 1)^2 / (2 epsilon)     w = 1 - sign(A) (r - 1) / epsilon, unbounded as mu -> 0

    DRPO is the same construction with a radius per token, epsilon = delta / mu. (Single-stream Policy Optimization is
    also called SPO; this is another method.)

    Args:
        epsilon: radius of the region, > 0, in units of the ratio.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: `epsilon` is not a positive number.

    Example:
        >>> SPO(0.2)
        SPO(epsilon=0.2)

    Source: Simple Policy Optimization, arXiv 2401.16025, Eq. 11.
    """

    epsilon: float
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("epsilon", self.epsilon, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return _quadratic(tokens, self.epsilon, power=1.0, advantage_weighted=True, penalised=None)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: |r - 1| > epsilon, where the weight is negative."""
        return prob_diff(tokens, power=1.0).abs() > self.epsilon


def _quadratic(
    tokens: Tokens, radius: float, power: float, advantage_weighted: bool, penalised: Tensor | None
) -> TokenLoss:
    """Return -r A + c x (r - 1) / (2 radius), x = (pi - mu) / mu^power, c = |A| or 1; slope -A r + c r x / radius."""
    _, _, advantage = wide(tokens)
    r = ratio(tokens)
    pull = prob_diff(tokens, power) / radius
    if advantage_weighted:
        pull = advantage.abs() * pull
    if penalised is not None:
        pull = torch.where(penalised, pull, 0)
    return token_loss(tokens, value=-r * advantage + pull * (r - 1) / 2, slope=-advantage * r + pull * r)


@dataclass(frozen=True)
class DivergencePenalty:
    """The surrogate with an advantage-weighted divergence that is not quadratic in pi - mu: the paper's ablations.

        loss = -r A + |A| c d,   d = |r - 1| / 2 ("tv"), -log r ("k1"), r - 1 - log r ("k3")
        w = 1 - sign(A) c d'(l) / r,   d'(l) = sign(r - 1) r / 2, -1, r - 1

    Args:
        kind: "tv", "k1" or "k3".
        coefficient: c >= 0.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: an unknown kind or a negative coefficient.

    Example:
        >>> DivergencePenalty("k3", 0.1)
        DivergencePenalty(kind='k3', coefficient=0.1)

    Source: DRPO, arXiv 2606.09821, its ablation of the regulariser (all found worse than Eq. 8).
    """

    kind: str
    coefficient: float
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, ("tv", "k1", "k3"))
        require("coefficient", self.coefficient, above=0, closed=True)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, behavior_logp, advantage = wide(tokens)
        r = ratio(tokens)
        log_ratio = (logp - behavior_logp).clamp(max=MAX_LOG_RATIO)
        excess = prob_diff(tokens, power=1.0)  # r - 1 without cancellation
        divergence, derivative = {
            "tv": (excess.abs() / 2, log_ratio.sign() * r / 2),
            "k1": (-log_ratio, -torch.ones_like(r)),
            "k3": (excess - log_ratio, excess),
        }[self.kind]
        weight = advantage.abs() * self.coefficient
        return token_loss(
            tokens, value=-r * advantage + weight * divergence, slope=-advantage * r + weight * derivative
        )
