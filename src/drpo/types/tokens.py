"""The records of the mathematics: T tokens, their loss, and the sampler's most probable tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from drpo.checks import require_columns
from drpo.errors import BrokenLogpError

OPTIONAL = frozenset({"divergence", "position", "proximal_logp", "score", "reference_logp"})
"""The columns of `Tokens` that may be None."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """T tokens of a batch or of a part of it; every tensor has shape [T].

    Args:
        logp: log pi(token | context), nats, float32, at the sampling temperature; the only input with a gradient.
        behavior_logp: log mu(token | context), nats, <= 0, float32, as the sampler that drew the token reported it.
        advantage: float32, reward units; how much better than its group the completion was.
        keep: bool; True where the policy sampled the token and it is trained.
        sequence: int64; equal numbers mean the same completion: all sampled tokens of an episode.
        divergence: float32; the top-K divergence that the objective's `needs` names, else None.
        position: int64; sorts the tokens of one sequence, by any numbers that rise along it. None: they are in order.
        proximal_logp: nats, <= 0, float32; the policy's own log-probability when the rollout arrived, for objectives
            whose `needs` names it, else None.
        score: float32, reward units; the reward of the token's episode, for objectives whose `needs` names it, else
            None.
        reference_logp: nats, <= 0, float32; a reference model's log-probability, a teacher's, for objectives whose
            `needs` names it, else None.

    Raises:
        InputError: a column of another shape, dtype or device; and, on the CPU, a kept token whose log-probability is
            NaN or positive (-inf is fine), whose advantage or score is not finite, or whose divergence is negative.

    Example:
        >>> t = Tokens(torch.tensor([-1.0]), torch.tensor([-1.1]), torch.tensor([1.0]),
        ...            torch.tensor([True]), torch.tensor([0]))
        >>> t.logp.shape
        torch.Size([1])
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    keep: Tensor
    sequence: Tensor
    divergence: Tensor | None = None
    position: Tensor | None = None
    proximal_logp: Tensor | None = None
    score: Tensor | None = None
    reference_logp: Tensor | None = None

    def __post_init__(self) -> None:
        columns = {name: values for name, values in vars(self).items() if name not in OPTIONAL or values is not None}
        require_columns("tokens.", columns, ("logp", self.logp), self.keep)

    def cpu(self) -> "Tokens":
        """Return a copy on the CPU."""
        return Tokens(**{name: values.cpu() for name, values in vars(self).items() if values is not None})

    @staticmethod
    def cat(parts: "Sequence[Tokens]") -> "Tokens":
        """Return the tokens of all parts, in order; at least one part. One without tokens may lack columns."""
        some = [p for p in parts if len(p.logp)] or parts[:1]
        columns: dict[str, Any] = {f.name: [getattr(p, f.name) for p in some] for f in fields(Tokens)}
        joined: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
        return Tokens(**joined)


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """An objective's loss per token.

    Args:
        loss: [T], to be minimised, differentiable in `Tokens.logp`; not reduced, not weighted.
        metrics: name -> [T] detached; the trainer averages each over the kept tokens.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TopK:
    """The sampler's K most probable tokens at each of n positions.

    The sampled token is among them only if it is one of the K most probable.

    Args:
        ids: [n, K] int64, by falling probability; all different within a position.
        logp: [n, K] float32, nats, <= 0; the sampler's log-probability of each, under the distribution it samples from.
            -inf only where top-k or top-p excludes the token.
    """

    ids: Tensor
    logp: Tensor

    def at(self, positions: "Tensor | slice") -> "TopK":
        """Return the rows of m positions: [m, K]."""
        return TopK(self.ids[positions], self.logp[positions])

    def to(self, device: torch.device) -> "TopK":
        """Return a copy on another device."""
        return TopK(self.ids.to(device), self.logp.to(device))

    def require(self, n: int, k: int) -> None:
        """Raise unless these are log-probabilities of k tokens at each of n positions.

        Raises:
            BrokenLogpError: another shape, or a log-probability that is NaN or positive.
        """
        for name, column in vars(self).items():
            if column.shape != (n, k):
                raise BrokenLogpError(
                    f"top_logprobs.{name} {list(column.shape)}: must be {[n, k]}, a row for each token and a column "
                    "for each of sampling.top_logprobs"
                )
        wrong = ~(self.logp <= 0)  # a NaN is not <= 0
        if wrong.any():
            row, rank = wrong.nonzero()[0].tolist()
            raise BrokenLogpError(f"top_logprobs.logp[{row}, {rank}]={self.logp[row, rank].item()}; it must be <= 0")

    @staticmethod
    def cat(parts: "Sequence[TopK]") -> "TopK":
        """Return the positions of all parts, in order; at least one part, all of the same K."""
        return TopK(torch.cat([p.ids for p in parts]), torch.cat([p.logp for p in parts]))
