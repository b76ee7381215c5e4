"""A critic in training: its values of a rollout before anything is batched, and its updates on the batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from drpo.credit.gae import GAE
from drpo.model.critic import Critic
from drpo.ranks import SINGLE_PROCESS, Ranks
from drpo.train import checkpoint, tensor_files
from drpo.train.step import optimize, per_sequence
from drpo.types import Batch, CriticStats, MicroBatch, ScoredGroup

PREFIX = "critic_"
"""Prefix of the critic's files in a checkpoint."""


@dataclass(frozen=True, eq=False)
class CriticTrainer:
    """A critic with its optimiser and settings.

    Args:
        critic: the critic.
        optimizer: over `critic.trainable()`.
        config: the critic's settings.
        learning_rate: constant, >= 0.
        max_grad_norm: the critic's gradient is scaled down to this L2 norm, > 0; inf is off.
        micro_batch_tokens: upper bound of positions per micro-batch of values; a single completion may exceed it.
        ranks: the processes that share the micro-batches; all have the same groups and batches.
    """

    critic: Critic
    optimizer: torch.optim.Optimizer
    config: GAE
    learning_rate: float
    max_grad_norm: float
    micro_batch_tokens: int
    ranks: Ranks = SINGLE_PROCESS

    @torch.no_grad()
    def values(self, groups: Sequence[ScoredGroup]) -> list[Tensor]:
        """Return V [M] of each sequence of the groups, in order, on the CPU; each rank computes some."""
        return per_sequence(self.critic, groups, self.critic, self.micro_batch_tokens, self.ranks)

    def train(self, batches: Sequence[Batch]) -> list[CriticStats]:
        """Train the critic on a step's batches and return each update's statistics; empty without tokens."""
        if not any(batch.micro_batches for batch in batches):
            return []
        return [self._update(batch) for batch in batches for _ in range(self.config.updates)]

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's part of the critic's weights and optimiser state into a checkpoint; return the files."""
        return tensor_files.write(folder, self.critic.checkpointed(), self.optimizer, self.ranks, prefix=PREFIX)

    def restore(self, folder: Path) -> None:
        """Restore what `save` wrote, bit for bit.

        Raises:
            InputError: the checkpoint has no critic, or another model's.
        """
        checkpoint.restore(folder, self.critic.checkpointed(), self.optimizer, prefix=PREFIX)

    def _update(self, batch: Batch) -> CriticStats:
        """Take one optimiser step, unless the gradient is not finite."""
        losses, norm = optimize(
            self.critic,
            self.optimizer,
            batch,
            self._backward,
            learning_rate=self.learning_rate,
            max_grad_norm=self.max_grad_norm,
            ranks=self.ranks,
        )
        n_tokens = sum(len(micro.target) for micro in batch.micro_batches)
        loss, clipped = sum(share for share, _ in losses), sum(n for _, n in losses)
        return CriticStats(loss, norm, clipped, n_tokens, taken=math.isfinite(norm))

    def _backward(self, micro: MicroBatch) -> tuple[float, int]:
        """Add a micro-batch's gradient; return its part of the loss, and the number of clipped values."""
        share, value = self.critic.loss(micro, self.config.clip)
        share.backward()
        assert micro.value is not None
        left = 0 if self.config.clip is None else int(((value - micro.value).abs() > self.config.clip).sum())
        return float(share.detach()), left
