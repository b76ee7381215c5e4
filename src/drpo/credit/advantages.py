"""Rewards of one prompt's G samples -> advantages; but for `reward`, exactly 0 where all rewards are equal.

Rewards that differ by at most 1e-6 of the largest count as equal: such a difference is float32 rounding, which a
division by the spread would enlarge to a signal.

Every function takes `rewards`, [..., G] float, G >= 2, finite, and returns advantages [..., G] float32 in reward units
(unitless for `zscore`, `maxrl` and `gdpo`), computed in float64, where the mean of equal float32 numbers is exact. Each
row has the advantages that it would have alone, bit for bit. A user's own function receives [G].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from drpo.checks import SAME
from drpo.errors import InputError
from drpo.spec import Registry

Advantage = Callable[[Tensor], Tensor]


def mean(rewards: Tensor) -> Tensor:
    """Return R - mean(R).

    Args:
        rewards: [..., G] float, G >= 2.

    Returns:
        [..., G] float32.

    Raises:
        InputError: G < 2, or a reward that is not finite.

    Example:
        >>> mean(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])

    Source: Dr. GRPO, arXiv 2503.20783; the setting of DRPO, arXiv 2606.09821.
    """
    return _centered(rewards).float()


def zscore(rewards: Tensor) -> Tensor:
    """Return (R - mean(R)) / std(R), with the sample's standard deviation (divisor G - 1); 0 for a constant group.

    Args:
        rewards: [..., G] float, G >= 2.

    Returns:
        [..., G] float32.

    Raises:
        InputError: G < 2, or a reward that is not finite.

    Example:
        >>> zscore(torch.tensor([1.0, -1.0])), zscore(torch.full((8,), 0.95))
        (tensor([ 0.7071, -0.7071]), tensor([0., 0., 0., 0., 0., 0., 0., 0.]))

    Source: GRPO, arXiv 2402.03300, Section 4.1.2.
    """
    return _standardised(rewards).float()


def rloo(rewards: Tensor) -> Tensor:
    """Return R_i - mean of the others' rewards = (R_i - mean(R)) G / (G - 1).

    Args:
        rewards: [..., G] float, G >= 2.

    Returns:
        [..., G] float32.

    Raises:
        InputError: G < 2, or a reward that is not finite.

    Example:
        >>> rloo(torch.tensor([1.0, 0.0, 0.0]))
        tensor([ 1.0000, -0.5000, -0.5000])

    Source: RLOO, arXiv 2402.14740, Eq. 8.
    """
    centered, n = _centered(rewards), rewards.shape[-1]
    return (centered * n / (n - 1)).float()


def maxrl(rewards: Tensor) -> Tensor:
    """Return (R - mean(R)) / mean(R) where the mean is positive, else 0: the rarer the success, the larger the step.

    Args:
        rewards: [..., G] float, G >= 2, >= 0.

    Returns:
        [..., G] float32.

    Raises:
        InputError: G < 2, or a reward that is not finite or is negative (the mean would be no success rate).

    Example:
        >>> maxrl(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([ 3., -1., -1., -1.])

    Source: Maximum Likelihood Reinforcement Learning (MaxRL).
    """
    centered = _centered(rewards)
    if (negative := (rewards < 0).any(-1)).any():
        raise InputError(
            f"rewards={rewards[negative][0].tolist()}: maxrl divides by their mean; none may be negative (use zscore)"
        )
    return _quotient(centered, rewards.double().mean(-1, keepdim=True)).float()


def reward(rewards: Tensor) -> Tensor:
    """Return R itself: no baseline within the group; `--whiten` then centres and scales the whole rollout.

    Args:
        rewards: [..., G] float, G >= 2.

    Returns:
        [..., G] float32.

    Raises:
        InputError: G < 2, or a reward that is not finite.

    Example:
        >>> reward(torch.tensor([1.0, 0.0, 0.0]))
        tensor([1., 0., 0.])

    Source: REINFORCE++, arXiv 2501.03262.
    """
    _require(rewards)
    return rewards.float()


def gdpo(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return sum_k w_k (R_k - mean(R_k)) / std(R_k): each reward of a sum is normalised within the group by itself.

    `drpo.credit.group_credit` then divides by the standard deviation over the rollout's completions. What the parts
    cancel to rounding (1e-6 of them) is 0.

    Args:
        rewards: [..., G] float, G >= 2, one reward, as `zscore`; with weights [K, G].
        weights: [K] float64, or None.

    Returns:
        [..., G] float32; with weights [G].

    Raises:
        InputError: G < 2, or a reward that is not finite.

    Example:
        >>> right_and_short = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
        >>> gdpo(right_and_short, torch.tensor([1.0, 0.5]))
        tensor([ 1.2990,  0.4330, -0.4330, -1.2990])

    Source: GDPO, arXiv 2601.05242, Section 3.
    """
    if weights is None:
        return zscore(rewards)
    parts = weights.double()[:, None] * _standardised(rewards)
    advantage = parts.sum(0)
    return torch.where(advantage.abs() <= SAME * parts.abs().sum(0), 0, advantage).float()


def _standardised(rewards: Tensor) -> Tensor:
    centered = _centered(rewards)
    deviation = (centered.square().sum(-1, keepdim=True) / (centered.shape[-1] - 1)).sqrt()
    return _quotient(centered, deviation)


def _require(rewards: Tensor) -> None:
    if rewards.ndim == 0 or rewards.shape[-1] < 2:
        raise InputError(
            f"rewards of shape {list(rewards.shape)}: an advantage compares the G samples of one prompt; "
            "it needs [..., G] with G >= 2 (sampling.samples)"
        )
    if (broken := ~rewards.isfinite().all(-1)).any():
        raise InputError(f"rewards={rewards[broken][0].tolist()}: every reward must be a finite number")


def _centered(rewards: Tensor) -> Tensor:
    _require(rewards)
    wide = rewards.double()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    equal = high - low <= SAME * torch.maximum(low.abs(), high.abs())
    return torch.where(equal, 0, wide - wide.mean(-1, keepdim=True))


def _quotient(centered: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, centered / torch.where(divisor > 0, divisor, 1), 0)


REGISTRY: Registry[Advantage] = Registry(
    "advantage", {"mean": mean, "zscore": zscore, "rloo": rloo, "maxrl": maxrl, "reward": reward, "gdpo": gdpo}
)
