"""Generalized advantage estimation from a critic's values, and the critic's loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drpo.checks import all_equal
from drpo.errors import InputError
from drpo.spec import Registry


@dataclass(frozen=True)
class GAE:
    """Settings of a critic and of the advantages computed from its values.

    Args:
        gamma: discount per token, (0, 1].
        lam: lambda, [0, 1]; 1 uses the reward alone, 0 the next token's value alone.
        clip: range of the clipped value loss around the value at rollout time, > 0, reward units; None is off.
        updates: optimiser updates of the critic per batch, >= 1.
        warmup: steps in which only the critic learns (the policy's learning rate is 0), >= 0.
        whiten: shift and scale the advantages of a rollout's tokens to mean 0 and standard deviation 1.

    Raises:
        InputError: a value out of its range; the message names the field.

    Example:
        >>> from drpo.spec import format_spec, parse_spec
        >>> parse_spec("gae(1.0, 0.9, clip=None)", REGISTRY)
        GAE(gamma=1.0, lam=0.9, clip=None, updates=1, warmup=0, whiten=True)
        >>> format_spec(GAE(lam=0.9), REGISTRY)
        'gae(1.0, 0.9)'
    """

    gamma: float = 1.0
    lam: float = 0.95
    clip: float | None = 0.2
    updates: int = 1
    warmup: int = 0
    whiten: bool = True

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", *(["clip"] if self.clip is not None else [])):
            if not _is_number(getattr(self, name)):
                raise InputError(f"critic {name}={getattr(self, name)!r}: must be a number")
        for name in ("updates", "warmup"):
            if type(getattr(self, name)) is not int:
                raise InputError(f"critic {name}={getattr(self, name)!r}: must be a whole number")
        _require(0 < self.gamma <= 1, "gamma", self.gamma, "must be in (0, 1]")
        _require(0 <= self.lam <= 1, "lam", self.lam, "must be in [0, 1]")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "must be positive, or None for no clipping")
        _require(self.updates >= 1, "updates", self.updates, "must be at least 1")
        _require(self.warmup >= 0, "warmup", self.warmup, "must be 0 or more")
        _require(isinstance(self.whiten, bool), "whiten", self.whiten, "must be True or False")


def gae(reward: Tensor, value: Tensor, sequence: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return the advantage and the return of every token.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = sum_k (gamma lam)^k delta_{t+k},    return_t = A_t + V_t

    The sums end with the completion, and V after its last token is 0. This holds for completions cut by
    `max_new_tokens` too: the reward scores the cut text, and nothing follows. Computed in float64.

    Args:
        reward: [T] float; each token's reward, reward units.
        value: [T] float; V of each token's context, reward units.
        sequence: [T] int64; equal for the tokens of one completion, which are adjacent and in order.
        gamma: discount per token, (0, 1].
        lam: lambda, [0, 1].

    Returns:
        Advantages [T] and returns [T], in the dtype of `value`.

    Example:
        >>> gae(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0, 0, 1]), 1.0, 0.5)
        (tensor([0.1250, 0.7500, 0.5000]), tensor([0.6250, 1.0000, 0.5000]))

    Source: arXiv 1506.02438, Eq. 16.
    """
    following = torch.zeros_like(value, dtype=torch.float64)
    following[:-1] = torch.where(sequence[1:] == sequence[:-1], value[1:].double(), 0)
    advantage = reward.double() + gamma * following - value.double()
    longest = int(sequence.unique_consecutive(return_counts=True)[1].max()) if len(sequence) else 0
    # Each round doubles the terms of every sum: the sum `summed` tokens ahead already holds the next `summed` terms.
    summed = 1
    while summed < longest:
        ahead = torch.where(sequence[summed:] == sequence[:-summed], advantage[summed:], 0)
        advantage[:-summed] += (gamma * lam) ** summed * ahead
        summed *= 2
    return advantage.to(value.dtype), (advantage + value.double()).to(value.dtype)


def whitened(advantage: Tensor) -> Tensor:
    """Return (A - mean(A)) / std(A), with the population's standard deviation; 0 where all are equal.

    Advantages that differ by at most 1e-6 of the largest count as equal.

    Args:
        advantage: [T] float.

    Returns:
        [T] of the same dtype; computed in float64.

    Example:
        >>> whitened(torch.tensor([1.0, 3.0])), whitened(torch.tensor([0.1, 0.1, 0.1]))
        (tensor([-1.,  1.]), tensor([0., 0., 0.]))
    """
    wide = advantage.double()
    if all_equal(wide):
        return torch.zeros_like(advantage)
    return ((wide - wide.mean()) / wide.std(correction=0)).to(advantage.dtype)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return each token's value loss, clipped as PPO's own implementation does.

        1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)

    Its gradient is 0 where V differs from V_old by more than the clip and is nearer to R than the clip allows.

    Args:
        value: [T] float, the critic's current values; the only input with a gradient.
        old_value: [T], the critic's values at rollout time.
        returns: [T], the targets.
        clip: > 0, or None for (V - R)^2 / 2.

    Returns:
        [T], reward units squared.

    Example:
        >>> value_loss(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, -1.0]), 0.25)
        tensor([0.2812, 1.1250])

    Source: PPO, arXiv 1707.06347; the clipping follows OpenAI baselines' `ppo2`, not an equation of the paper.
    """
    loss = (value - returns).square()
    if clip is not None:
        near = old_value + (value - old_value).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns).square())
    return loss / 2


def explained_variance(value: Tensor, returns: Tensor) -> float | None:
    """Return 1 - Var(R - V) / Var(R): 1 for perfect values, 0 for constant ones; None where all R are equal (to 1e-6).

    Args:
        value: [T] float.
        returns: [T] float.

    Example:
        >>> explained_variance(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 1.0]))
        0.75
    """
    if all_equal(returns):
        return None
    return 1 - float((returns.double() - value.double()).var(correction=0) / returns.double().var(correction=0))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(fine: bool, name: str, value: object, rule: str) -> None:
    if not fine:
        raise InputError(f"critic {name}={value}: {rule}")


REGISTRY: Registry[GAE] = Registry("critic", {"gae": GAE}, instance_of=GAE)
