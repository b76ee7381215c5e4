"""Objectives with statistics of the whole optimiser batch: M2PO, AReaL's M2PO, Clip-Cov, KL-Cov.

Each has `of_batch(tokens)`, which computes the statistics and returns an objective of single tokens; a trainer that
splits the batch calls it once before (`contract.of_batch`). Called directly, they take the call's tokens for the batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo.objectives._check import require
from drpo.objectives.clip import PPOClip
from drpo.objectives.closed_form import masked_surrogate, token_loss
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, ratio, wide
from drpo.objectives.sequences import Sequences, widest
from drpo.types import TokenLoss, Tokens

BATCH = frozenset({"batch"})
FAR = 1e15
"""Bound of a log-ratio that is squared: its square is finite, and beyond every threshold."""


def _squares(tokens: Tokens) -> Tensor:
    """Return (l - m)^2, [T], finite."""
    return log_ratio(tokens).clamp(-FAR, FAR).square()


def _rising(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen values in rising order, then inf; and their running sums, in the widest dtype."""
    ordered = torch.where(chosen, values, torch.inf).sort().values
    return ordered, torch.where(ordered.isinf(), 0, ordered).to(widest(values)).cumsum(0)


def _number(chosen: Tensor) -> Tensor:
    """Return how many are chosen, [1], in the widest dtype."""
    return chosen.sum()[None].to(widest(chosen))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return values[index], [1], without a device sync; `index` is [1]."""
    return values.gather(0, index)


def _first(condition: Tensor) -> Tensor:
    """Return the first index where `condition` [T] holds, [1]; T where it never does."""
    return torch.cat([condition, condition.new_ones(1)]).int().argmax()[None]


@dataclass(frozen=True)
class M2PO:
    """PPO's clip with bounds from the batch: the second moment of the log-ratios that it lets through has a budget.

        loss  = -min(r A, clip(r, e^-tau, e^tau) A)      w = 0 where the clip binds, else 1
        v     = (l - m)^2 of the kept tokens with A (r - 1) > 0
        tau^2 = the largest of them whose winsorised mean, mean_j min(v_j, tau^2), stays below the budget

    Tokens that move inward count nowhere and are never clipped. The marginal token, whose v is tau^2, is clipped, as in
    the authors' program. A mean of v within the budget clips nothing; where every v exceeds it, tau is 0.

    Args:
        budget: > 0, squared nats.
        floor_low: in [0, 1]; ratios down to 1 - floor_low are never clipped.
        floor_high: >= 0; ratios up to 1 + floor_high are never clipped.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> M2PO().needs, M2PO()
        (frozenset({'batch'}), M2PO(budget=0.04, floor_low=0.0, floor_high=0.0))

    Source: arXiv 2510.01161; the authors' program, whose scripts have no floors and whose signature has 0.3 and 0.5.
    """

    budget: float = 0.04
    floor_low: float = 0.0
    floor_high: float = 0.0
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = BATCH

    def __post_init__(self) -> None:
        require("budget", self.budget, above=0)
        require("floor_low", self.floor_low, above=0, below=1, closed=True)
        require("floor_high", self.floor_high, above=0, closed=True)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return self.of_batch(tokens)(tokens)

    def of_batch(self, tokens: Tokens) -> "WithinBudget":
        """Return the clip with this batch's bounds."""
        _, _, advantage = wide(tokens)
        outward = tokens.keep & (advantage * log_ratio(tokens) > 0)
        (ordered, sums), n = _rising(_squares(tokens), outward), _number(outward)
        rest = n - 1 - torch.arange(len(ordered), device=ordered.device)
        spent = torch.where(rest >= 0, ordered.nan_to_num(posinf=0) * rest + sums, -torch.inf) >= self.budget * n
        exceeds = torch.where(rest == 0, sums > self.budget * n, False).any()
        before = _at(torch.cat([ordered.new_zeros(1), ordered]), _first(spent))
        return WithinBudget(torch.where(exceeds, before, torch.inf), self.floor_low, self.floor_high)


@dataclass(frozen=True, eq=False)
class WithinBudget:
    """`M2PO` of a batch whose bound is known.

    Args:
        square: [1]; tau^2.
        floor_low, floor_high: as of `M2PO`.
    """

    square: Tensor
    floor_low: float
    floor_high: float
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        r, tau = ratio(tokens), self.square.to(tokens.logp.device).sqrt().clamp(max=MAX_LOG_RATIO)
        high = tau.exp().clamp(min=1 + self.floor_high)
        low = (-tau).exp().clamp(max=1 - self.floor_low)
        binds = self.out_of_region(tokens) & (advantage * log_ratio(tokens) > 0)
        bounded = torch.where(binds, torch.where(advantage > 0, high, low), r)
        return token_loss(tokens, value=-advantage * bounded, slope=-advantage * r * ~binds)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: (l - m)^2 >= tau^2, and r outside the floors."""
        r = ratio(tokens)
        far = _squares(tokens) >= self.square.to(r.device)
        return far & ((r < 1 - self.floor_low) | (r > 1 + self.floor_high))


@dataclass(frozen=True)
class M2POAReaL:
    """AReaL's M2PO: drops the largest squared log-ratios of the batch, whatever their direction.

        loss = -r A M     w = M
        M    = 0 for the largest (l - m)^2, until the mean of the rest is below the threshold; one token stays

    Equal squares are kept or dropped together. The authors' method is `M2PO`, another one.

    Args:
        threshold: > 0, squared nats.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: `threshold` is not a positive number.

    Example:
        >>> M2POAReaL()
        M2POAReaL(threshold=0.04)

    Source: AReaL 1.0.4, `_apply_m2po_masking`, with the sampler against the current policy.
    """

    threshold: float = 0.04
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = BATCH

    def __post_init__(self) -> None:
        require("threshold", self.threshold, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return self.of_batch(tokens)(tokens)

    def of_batch(self, tokens: Tokens) -> "BelowSquare":
        """Return the mask with this batch's bound."""
        return BelowSquare(SecondMoment(self.threshold).of_batch(tokens))


@dataclass(frozen=True)
class SecondMoment:
    """The mask of AReaL's M2PO as a factor: drops the largest squared log-ratios of the batch.

        M = 0 for the largest (l - m)^2, until the mean of the rest is below the threshold; one token stays

    `none*second_moment(0.04)` is `m2po_areal(0.04)`; behind `proximal` the log-ratios are of the proximal policy to the
    sampler, as in AReaL.

    Args:
        threshold: > 0, squared nats.

    Raises:
        InputError: `threshold` is not a positive number.

    Example:
        >>> SecondMoment(0.04).needs
        frozenset({'batch'})

    Source: AReaL 1.0.4, `_apply_m2po_masking`.
    """

    threshold: float = 0.04
    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = BATCH

    def __post_init__(self) -> None:
        require("threshold", self.threshold, above=0)

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] 1 or 0."""
        return self.of_batch(tokens).factor(tokens)

    def of_batch(self, tokens: Tokens) -> "SmallSquares":
        """Return the mask with this batch's bound."""
        ordered, sums = _rising(_squares(tokens), tokens.keep)
        count = torch.arange(1, len(ordered) + 1, device=ordered.device, dtype=sums.dtype)
        too_many = (sums >= self.threshold * count) | ordered.isinf()
        last = _at(torch.cat([ordered[:1], ordered, ordered.new_full((1,), torch.inf)]), _first(too_many))
        return SmallSquares(last)


@dataclass(frozen=True, eq=False)
class SmallSquares:
    """`SecondMoment` of a batch whose bound is known.

    Args:
        square: [1]; the largest (l - m)^2 that is kept.
    """

    square: Tensor
    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] 1 or 0."""
        return (~self.out_of_region(tokens)).to(wide(tokens)[0].dtype)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: (l - m)^2 is above the bound."""
        return _squares(tokens) > self.square.to(tokens.logp.device)


@dataclass(frozen=True, eq=False)
class BelowSquare:
    """`M2POAReaL` of a batch whose bound is known.

    Args:
        mask: of the batch.
    """

    mask: SmallSquares
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return masked_surrogate(tokens, ~self.out_of_region(tokens))

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: (l - m)^2 is above the bound."""
        return self.mask.out_of_region(tokens)


@dataclass(frozen=True, eq=False)
class Covariance:
    """A token's term of the batch's covariance of advantage and log-probability.

        cov_t = (A_t - mean A) (l_t - mean l)

    Args:
        advantage: [1]; the mean over the batch's kept tokens.
        logp: [1], nats; the mean of l.
    """

    advantage: Tensor
    logp: Tensor

    @staticmethod
    def of(tokens: Tokens) -> "Covariance":
        """Return the means of a batch."""
        logp, _, advantage = wide(tokens)
        batch = Sequences.whole(tokens)
        return Covariance(batch.mean(advantage)[:1], batch.mean(logp.clamp(min=-FAR))[:1])

    def __call__(self, tokens: Tokens) -> Tensor:
        """Return cov [T]."""
        logp, _, advantage = wide(tokens)
        mean_advantage, mean_logp = self.advantage.to(logp.device), self.logp.to(logp.device)
        return (advantage - mean_advantage) * (logp.clamp(min=-FAR) - mean_logp)


@dataclass(frozen=True)
class ClipCov:
    """PPO's clip, and no gradient for a few random tokens of high covariance of advantage and log-probability.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A), and 0 where dropped     w = PPO's, and 0 where dropped
        dropped: `fraction` of the batch's N kept tokens, among those that the clip does not bind and whose
                 cov_low < cov < cov_high, cov = (A - mean A) (l - mean l) over the batch

    Each eligible token is dropped with probability fraction N / their number, so `fraction` holds in the mean; where
    fraction N is below 1, one token is dropped in the mean. The random number is a hash of the token's own l, m and A.
    It is another after each update, and the same however the batch is split, as far as l is: where l is rounded
    otherwise, another token may be dropped.

    Args:
        low: in [0, 1].
        high: >= 0.
        fraction: in (0, 1].
        cov_low: nats times reward units.
        cov_high: > cov_low.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> ClipCov()
        ClipCov(low=0.2, high=0.2, fraction=0.0002, cov_low=1.0, cov_high=5.0)

    Source: The Entropy Mechanism of RL, arXiv 2505.22617; the authors' program and verl's `clip_cov`, where the
    covariance is the micro-batch's.
    """

    low: float = 0.2
    high: float = 0.2
    fraction: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = BATCH

    def __post_init__(self) -> None:
        PPOClip(self.low, self.high)
        require("fraction", self.fraction, above=0)
        require("fraction", self.fraction, above=0, below=1, closed=True)
        require("cov_low", self.cov_low, above=-torch.inf)
        require("cov_high", self.cov_high, above=self.cov_low)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return self.of_batch(tokens)(tokens)

    def of_batch(self, tokens: Tokens) -> "Dropping":
        """Return PPO with this batch's covariance."""
        found = Dropping(self, Covariance.of(tokens), tokens.logp.new_ones(1))
        n_dropped = (self.fraction * _number(tokens.keep)).clamp(min=1)
        n_eligible = _number(tokens.keep & found.eligible(tokens)).clamp(min=1)
        return Dropping(self, found.covariance, n_dropped / n_eligible)


@dataclass(frozen=True, eq=False)
class Dropping:
    """`ClipCov` of a batch whose statistics are known.

    Args:
        method: its parameters.
        covariance: of the batch.
        probability: [1]; of an eligible token to be dropped; above 1 all are.
    """

    method: ClipCov
    covariance: Covariance
    probability: Tensor
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        drawn = _uniform(tokens) < self.probability.to(tokens.logp.device)
        kept = ~(self.eligible(tokens) & drawn)
        return TokenLoss(PPOClip(self.method.low, self.method.high)(tokens).loss * kept)

    def eligible(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: the clip does not bind, and the covariance is between its bounds."""
        _, _, advantage = wide(tokens)
        r = ratio(tokens)
        free = torch.where(advantage > 0, r <= 1 + self.method.high, (r >= 1 - self.method.low) | (advantage == 0))
        cov = self.covariance(tokens)
        return free & (cov > self.method.cov_low) & (cov < self.method.cov_high)


def _uniform(tokens: Tokens) -> Tensor:
    """Return a number in [0, 1) of each token, [T], a hash of its columns."""
    mixed = torch.zeros_like(tokens.sequence)
    for column in (tokens.logp, tokens.behavior_logp, tokens.advantage):
        mixed = (mixed ^ column.detach().float().view(torch.int32).long()) & 0xFFFFFFFF
        for _ in range(2):  # the finaliser of a 32-bit hash, in 64 bits so that no product overflows
            mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 16)
    return mixed.to(torch.float32 if mixed.device.type == "mps" else torch.float64) / 2**32


@dataclass(frozen=True)
class KLCov:
    """The unclipped surrogate, and a pull back for the tokens of highest covariance of advantage and log-probability.

        loss = -r A + c |l - m| [top]     d loss / d l = -A r + c sign(l - m) [top]
        top: the `fraction` of the batch's kept tokens with the largest (A - mean A) (l - mean l)

    Tokens of equal covariance are chosen together. There is no clip. The log-ratio is capped at 20 nats either way.

    Args:
        fraction: in (0, 1]; at least one token is chosen.
        coefficient: c > 0; the authors' program has 1, verl's configuration 0.1.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> KLCov()
        KLCov(fraction=0.0002, coefficient=1.0)

    Source: The Entropy Mechanism of RL, arXiv 2505.22617 (its 0.2 is a percentage); verl's `kl_cov`, where the
    covariance is the micro-batch's.
    """

    fraction: float = 2e-4
    coefficient: float = 1.0
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = BATCH

    def __post_init__(self) -> None:
        require("fraction", self.fraction, above=0)
        require("fraction", self.fraction, above=0, below=1, closed=True)
        require("coefficient", self.coefficient, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return self.of_batch(tokens)(tokens)

    def of_batch(self, tokens: Tokens) -> "PulledBack":
        """Return the surrogate with this batch's covariance."""
        covariance = Covariance.of(tokens)
        falling = torch.where(tokens.keep, -covariance(tokens), torch.inf).sort().values
        n = (self.fraction * _number(tokens.keep)).floor().long().clamp(min=1)
        least = -_at(torch.cat([falling.new_full((1,), -torch.inf), falling]), n.clamp(max=len(falling)))
        return PulledBack(self.coefficient, covariance, least)


@dataclass(frozen=True, eq=False)
class PulledBack:
    """`KLCov` of a batch whose statistics are known.

    Args:
        coefficient: c.
        covariance: of the batch.
        least: [1]; the smallest covariance that is chosen.
    """

    coefficient: float
    covariance: Covariance
    least: Tensor
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        _, _, advantage = wide(tokens)
        r = ratio(tokens)
        gap = log_ratio(tokens).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        pull = self.coefficient * (self.covariance(tokens) >= self.least.to(r.device)).to(r.dtype)
        return token_loss(tokens, value=-r * advantage + pull * gap.abs(), slope=-advantage * r + pull * gap.sign())
