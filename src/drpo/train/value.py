"""What a critic does in a step: it gives every token its advantage, and then learns from what was earned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from drpo.critic import Critic
from drpo.gae import GAE, explained_variance, gae, whitened
from drpo.ranks import ALONE, Ranks
from drpo.train import checkpoint
from drpo.train.update import share_out, take_step
from drpo.types import Batch, MicroBatch

PREFIX = "critic_"
"""Of its files in a checkpoint."""


@dataclass(frozen=True, eq=False)
class ValueLearner:
    """A critic in training.

    Args:
        critic: whose values they are.
        optimizer: over `critic.trainable()`.
        how: values become advantages, and are learnt.
        max_grad_norm: the critic's gradient is scaled down to this L2 norm.
        ranks: who share the micro-batches; all have the same batches.
    """

    critic: Critic
    optimizer: torch.optim.Optimizer
    how: GAE
    max_grad_norm: float
    ranks: Ranks = ALONE

    def appraise(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return a rollout's batches with the advantage, the value and the return of every token.

        Args:
            batches: whose advantages are the rewards of their completions, as `make_batches` leaves them for a critic.
        """
        micros = [micro for batch in batches for micro in batch.micro_batches]
        if not micros:
            return list(batches)
        values = self._values(micros)
        found = [self._gae(m, v) for m, v in zip(micros, values, strict=True)]
        advantage = torch.cat([a for a, _ in found])
        advantages = (whitened(advantage) if self.how.whiten else advantage).split([len(v) for v in values])
        appraised = iter(
            replace(m, advantage=a, value=v, returns=r)
            for m, a, v, (_, r) in zip(micros, advantages, values, found, strict=True)
        )
        return [_with(batch, [next(appraised) for _ in batch.micro_batches]) for batch in batches]

    def learn(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Train the critic on appraised batches and return the figures of `VALUE_METRICS`.

        Raises:
            FloatingPointError: a gradient is not finite; that update was not made.
        """
        old = torch.cat([m.value for b in batches for m in b.micro_batches if m.value is not None] or [torch.empty(0)])
        returns = [m.returns for b in batches for m in b.micro_batches if m.returns is not None]
        if not returns:
            return {}
        explained = explained_variance(old, torch.cat(returns))
        losses, norms, clipped = zip(*(self._update(b) for b in batches for _ in range(self.how.updates)), strict=True)
        return {
            "value_loss": losses[-1],
            "value_grad_norm": max(norms),
            "value_mean": float(old.double().mean()),
            "value_clipped": sum(clipped) / (len(old) * self.how.updates),
            **({} if explained is None else {"explained_variance": explained}),
        }

    def save(self, folder: Path) -> None:
        """Write the critic's weights and optimiser state into the folder of a checkpoint, on the first rank."""
        if self.ranks.first:
            checkpoint.write(folder, self.critic.trainable(), self.optimizer, prefix=PREFIX)

    def restore(self, folder: Path) -> None:
        """Go on as `save` left it, to the bit.

        Raises:
            InputError: the checkpoint has no critic, or another one.
        """
        checkpoint.restore(folder, self.critic.trainable(), self.optimizer, prefix=PREFIX)

    @torch.no_grad()
    def _values(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        """[T] of each, on the CPU; each rank computes some."""
        number = {id(micro): i for i, micro in enumerate(micros)}
        own, _ = share_out(micros, self.ranks)
        found = self.ranks.gather([(number[id(m)], self.critic(m.to(self.critic.device)).cpu()) for m in own])
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def _gae(self, micro: MicroBatch, value: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.ones_like(micro.sequence, dtype=torch.bool)
        last[:-1] = micro.sequence[1:] != micro.sequence[:-1]
        reward = torch.where(last, micro.advantage, 0)  # what a completion earns comes with its last token
        return gae(reward, value, micro.sequence, self.how.gamma, self.how.lam)

    def _update(self, batch: Batch) -> tuple[float, float, int]:
        """Take one optimiser step; return the loss, the gradient's norm, and how many values had left the clip."""
        parameters = list(self.critic.trainable().values())
        self.optimizer.zero_grad(set_to_none=True)
        own, _ = share_out(batch.micro_batches, self.ranks)
        found = self.ranks.gather([self._backward(micro) for micro in own])
        self.critic.reduce_gradients(self.ranks)
        loss = sum(share for share, _ in found)
        norm = take_step(self.optimizer, parameters, self.how.learning_rate, self.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the critic's gradient has the norm {norm} (loss {loss}); the update was not made"
            )
        return loss, norm, sum(n for _, n in found)

    def _backward(self, micro: MicroBatch) -> tuple[float, int]:
        here = micro.to(self.critic.device)
        share, value = self.critic.loss(here, self.how.clip)
        share.backward()
        assert here.value is not None
        left = 0 if self.how.clip is None else int(((value - here.value).abs() > self.how.clip).sum())
        return float(share.detach()), left


def _with(batch: Batch, micros: Sequence[MicroBatch]) -> Batch:
    """A batch of these micro-batches; what it says of a completion is the mean over the completion's tokens."""
    sums = torch.zeros(len(batch.completions), dtype=torch.float64)
    for micro in micros:
        sums.index_add_(0, micro.sequence, micro.advantage.double())
    lengths = torch.tensor([len(c.token_ids) for c in batch.completions])
    return replace(batch, micro_batches=tuple(micros), advantages=(sums / lengths).float())
