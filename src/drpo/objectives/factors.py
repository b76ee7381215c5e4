"""Factors of an objective: rejection masks and importance weights, each a constant per token.

A factor multiplies an objective's loss and its gradient: `ppo(0.2, 0.28)*band(0.5, 5)`. A sequence's factor is that of
all its tokens. Rejected tokens stay in the reduction's denominator: weights are fixed when the batch is built.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require, require_one_of
from drpo.objectives.mask import bernoulli_kl
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, prob_diff, wide
from drpo.objectives.sequences import Sequences
from drpo.types import Tokens

RATIOS = ("token", "sequence", "geometric")
"""Which ratio: r of the token, R = prod_i r of its sequence, or G = R^(1/n_i)."""


class Factor(Protocol):
    """A constant per token that multiplies an objective.

    Attributes:
        tokenwise, needs: as of `contract.Objective`.
        out_of_region: optional method, as of `contract.HasRegion`: what is rejected.
        of_batch: where `needs` has "batch": the factor with the statistics of the batch.
    """

    @property
    def tokenwise(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T], finite and >= 0; 0 where a token is rejected."""
        ...


def log_of_ratio(tokens: Tokens, over: str) -> Tensor:
    """Return [T] the logarithm of one of `RATIOS` at each token."""
    if over == "token":
        return log_ratio(tokens)
    sequences = Sequences.of(tokens)
    return sequences.sum(log_ratio(tokens)) if over == "sequence" else sequences.mean(log_ratio(tokens))


@dataclass(frozen=True)
class Band:
    """Keeps a token iff a ratio of pi to mu lies in [low, high]; the bounds are inclusive.

        M = [low <= x <= high],   x = r (IcePop), R = prod_i r, G = R^(1/n_i), or every r of the sequence

    Args:
        low: >= 0; 0 means no lower bound.
        high: > low.
        over: "token", "sequence" (R), "geometric" (G), or "every": the whole sequence is rejected with its first token
            outside.

    Raises:
        InputError: a parameter out of its range.

    Example:
        >>> Band(0.999, 1.001, "geometric").tokenwise, Band(0.5, 5).tokenwise
        (False, True)

    Source: IcePop, arXiv 2510.18855 ("token"); NeMo-RL's seq-mask-tis and TRM, arXiv 2512.23075 ("geometric"); TRL's
    sequence_mask ("sequence"); prime-rl's sequence minimum and maximum, until March 2026 ("every").
    """

    low: float
    high: float
    over: str = "token"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("low", self.low, above=0, closed=True)
        require("high", self.high, above=self.low)
        require_one_of("over", self.over, (*RATIOS, "every"))

    @property
    def tokenwise(self) -> bool:
        """False where the ratio is a sequence's."""
        return self.over == "token"

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] 1 or 0."""
        return (~self.out_of_region(tokens)).to(wide(tokens)[0].dtype)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: the ratio is outside [low, high]."""
        if self.over != "every":
            return _outside(log_of_ratio(tokens, self.over), self.low, self.high)
        outside = _outside(log_ratio(tokens), self.low, self.high)
        return Sequences.of(tokens).max(outside.to(wide(tokens)[0].dtype)) > 0


def _outside(log_x: Tensor, low: float, high: float) -> Tensor:
    x = log_x.clamp(max=MAX_LOG_RATIO).exp()
    return (x < low) | (x > high)


@dataclass(frozen=True)
class Reject:
    """Keeps a token iff an estimate of a divergence stays within its bound, under verl's names.

        k1 = m - l:             keep iff log low <= the statistic <= log high
        k2 = (l - m)^2 / 2:     keep iff the statistic <= high
        k3 = r - 1 - (l - m):   keep iff the statistic <= high

    The statistic is the token's, or the sum, mean or maximum over the sequence's kept tokens. k1's bounds are bounds of
    1/r: for r itself there is `Band`. In a sum or mean of k1 signs cancel; k2 and k3 are >= 0.

    Args:
        statistic: "token_k1", "seq_sum_k1", "seq_mean_k1", "seq_max_k1", and so with k2 and k3.
        high: > 0; the bound, for k1 a ratio.
        low: for k1 alone, in [0, high); 0 means no lower bound.

    Raises:
        InputError: a parameter out of its range, or a lower bound for k2 or k3.

    Example:
        >>> Reject("seq_mean_k3", 0.01).tokenwise
        False

    Source: verl's rollout correction (`rollout_rs`); the maximum as a trust region: TRM, arXiv 2512.23075.
    """

    statistic: str
    high: float
    low: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_one_of("statistic", self.statistic, STATISTICS)
        require("low", self.low, above=0, closed=True)
        if self.low and not self.statistic.endswith("k1"):
            raise InputError(f"low={self.low!r}: {self.statistic} has an upper bound alone; leave it out")
        require("high", self.high, above=self.low)

    @property
    def tokenwise(self) -> bool:
        """False where the statistic is a sequence's."""
        return self.statistic.startswith("token")

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] 1 or 0."""
        return (~self.out_of_region(tokens)).to(wide(tokens)[0].dtype)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: the statistic is beyond a bound."""
        over, _, kind = self.statistic.rpartition("_")
        x = _ESTIMATES[kind](tokens)
        x = x if over == "token" else getattr(Sequences.of(tokens), over.removeprefix("seq_"))(x)
        return x > self.high if kind != "k1" else _outside(x, self.low, self.high)


def _k1(tokens: Tokens) -> Tensor:
    return -log_ratio(tokens)


def _k2(tokens: Tokens) -> Tensor:
    return log_ratio(tokens).square() / 2


def _k3(tokens: Tokens) -> Tensor:
    return prob_diff(tokens, power=1.0) - log_ratio(tokens)


_ESTIMATES = {"k1": _k1, "k2": _k2, "k3": _k3}
STATISTICS = tuple(f"{over}_{kind}" for over in ("token", "seq_sum", "seq_mean", "seq_max") for kind in _ESTIMATES)
"""The statistics of `Reject`."""


@dataclass(frozen=True)
class BinaryKL:
    """Keeps a token iff the Binary KL stays within its bound in both directions: KPop's mask.

        M = [max(KL(Bern(pi) || Bern(mu)), KL(Bern(mu) || Bern(pi))) <= delta]

    `none*binary_kl(0.1)` is `kpop(0.1)`; behind `proximal` it is between the proximal policy and the sampler.

    Args:
        delta: > 0, nats.

    Raises:
        InputError: `delta` is not a positive number.

    Example:
        >>> BinaryKL(0.1).tokenwise
        True

    Source: KPop, ringtech.notion.site/kpop; AReaL pull request 1405, `binary_kl`, whose example has 2.0.
    """

    delta: float
    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] 1 or 0."""
        return (~self.out_of_region(tokens)).to(wide(tokens)[0].dtype)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: either divergence is above delta."""
        logp, behavior_logp, _ = wide(tokens)
        return torch.maximum(bernoulli_kl(behavior_logp, logp), bernoulli_kl(logp, behavior_logp)) > self.delta


@dataclass(frozen=True)
class OPSM:
    """Off-policy sequence mask: drops a failed sequence whose policy has moved away from the sampler.

        M = [A >= 0 or mean_i(m - l) <= delta]

    The mean is signed, not k3: it can be negative, and never drops then.

    Args:
        delta: nats, > 0.

    Raises:
        InputError: `delta` is not a positive number.

    Example:
        >>> OPSM(1e-4)
        OPSM(delta=0.0001)

    Source: DeepSeek-V3.2, arXiv 2512.02556, Eq. 9; slime's default is 1e-4, TRL's example 0.5.
    """

    delta: float
    tokenwise: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] 1 or 0."""
        advantage = wide(tokens)[2]
        return ((advantage >= 0) | ~self.out_of_region(tokens)).to(advantage.dtype)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: the sequence's mean of m - l is above delta."""
        return Sequences.of(tokens).mean(-log_ratio(tokens)) > self.delta


@dataclass(frozen=True)
class ImportanceWeight:
    """A truncated or masked importance weight, for an objective without a ratio of its own: `reinforce*weight(...)`.

        W = clip(x, floor, cap)     truncated (TIS)
        W = x [low <= x <= high]    masked (MIS), and both together

    with x = r, R = prod_i r or G = R^(1/n_i).

    Args:
        over: "token", "sequence" or "geometric".
        cap: > 0, or None for no truncation.
        low: >= 0; x below it is rejected.
        high: > low, or None; x above it is rejected.
        normalize: divide by the mean of W over the optimiser batch, before any rejection: over its kept tokens, or over
            its sequences where W is a sequence's.
        floor: in [0, cap]; smaller x count as this, where they are not rejected (slime's tis_clip_low).

    Raises:
        InputError: a parameter out of its range, or neither a cap nor a bound above.

    Example:
        >>> ImportanceWeight("sequence", cap=2.0)
        ImportanceWeight(over='sequence', cap=2.0, low=0.0, high=None, normalize=False, floor=0.0)

    Source: verl's rollout correction (`rollout_is`); truncation: Ionides 2008.
    """

    over: str = "token"
    cap: float | None = None
    low: float = 0.0
    high: float | None = None
    normalize: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        require_one_of("over", self.over, RATIOS)
        require("low", self.low, above=0, closed=True)
        for name, bound, above in (("cap", self.cap, 0.0), ("high", self.high, self.low)):
            if bound is not None:
                require(name, bound, above=above)
        if self.cap is None and self.high is None:
            raise InputError("cap=None: an importance weight needs a cap or a bound above; set cap=2.0 or high=5.0")
        require("floor", self.floor, above=0, below=torch.inf if self.cap is None else self.cap, closed=True)

    @property
    def tokenwise(self) -> bool:
        """False where the ratio is a sequence's."""
        return self.over == "token"

    @property
    def needs(self) -> frozenset[str]:
        """The batch, if the weights are divided by its mean."""
        return frozenset({"batch"}) if self.normalize else frozenset()

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] W."""
        if self.normalize:
            return self.of_batch(tokens).factor(tokens)
        return self._weight(tokens)

    def out_of_region(self, tokens: Tokens) -> Tensor | None:
        """Return [T] bool: x is outside [low, high]; None without bounds."""
        if self.low == 0 and self.high is None:
            return None
        return _outside(log_of_ratio(tokens, self.over), self.low, torch.inf if self.high is None else self.high)

    def of_batch(self, tokens: Tokens) -> "Scaled":
        """Return the weights over their mean in this batch."""
        weight, batch = self._weight(tokens), Sequences.whole(tokens)
        count = torch.ones_like(weight) if self.tokenwise else 1 / Sequences.of(tokens).count(weight)
        mean = batch.sum(count * weight)[:1] / batch.sum(count)[:1]
        return Scaled(self, 1 / torch.where(mean > 0, mean, 1).clamp(min=torch.finfo(mean.dtype).tiny))

    def _weight(self, tokens: Tokens) -> Tensor:
        x = log_of_ratio(tokens, self.over).clamp(max=MAX_LOG_RATIO).exp()
        outside = self.out_of_region(tokens)
        floored = x.clamp(min=self.floor)
        kept = floored if outside is None else torch.where(outside, 0, floored)
        return kept if self.cap is None else kept.clamp(max=self.cap)


@dataclass(frozen=True, eq=False)
class Scaled:
    """The weights of a batch whose mean is known.

    Args:
        weight: before the division.
        scale: [1]; 1 / the mean.
    """

    weight: ImportanceWeight
    scale: Tensor
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def tokenwise(self) -> bool:
        """As of the weight."""
        return self.weight.tokenwise

    def factor(self, tokens: Tokens) -> Tensor:
        """Return [T] W over its mean."""
        return self.weight._weight(tokens) * self.scale.to(tokens.logp.device)

    def out_of_region(self, tokens: Tokens) -> Tensor | None:
        """As of the weight."""
        return self.weight.out_of_region(tokens)
