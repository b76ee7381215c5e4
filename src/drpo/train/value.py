"""What a critic does in a step: it gives every token its advantage, and then learns from what was earned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from drpo.critic import Critic
from drpo.gae import GAE, gae, whitened
from drpo.ranks import ALONE, Ranks
from drpo.train import checkpoint
from drpo.train.update import share_out, take_step
from drpo.types import Batch, Lesson, MicroBatch

PREFIX = "critic_"
"""Of its files in a checkpoint."""


@dataclass(frozen=True, eq=False)
class ValueLearner:
    """A critic in training.

    Args:
        critic: whose values they are.
        optimizer: over `critic.trainable()`.
        how: values become advantages, and are learnt.
        max_grad_norm: the critic's gradient is scaled down to this L2 norm, > 0; inf is off.
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

    def learn(self, batches: Sequence[Batch]) -> list[Lesson]:
        """Train the critic on appraised batches and return what each update saw; none where there is no token."""
        if not any(batch.micro_batches for batch in batches):
            return []
        return [self._update(batch) for batch in batches for _ in range(self.how.updates)]

    def save(self, folder: Path) -> list[Path]:
        """Write this rank's part of the critic's weights and optimiser state into a checkpoint; return the files."""
        return checkpoint.write(folder, self.critic.checkpointed(), self.optimizer, self.ranks, prefix=PREFIX)

    def restore(self, folder: Path) -> None:
        """Go on as `save` left it, to the bit.

        Raises:
            InputError: the checkpoint has no critic, or another one.
        """
        checkpoint.restore(folder, self.critic.checkpointed(), self.optimizer, prefix=PREFIX)

    @torch.no_grad()
    def _values(self, micros: Sequence[MicroBatch]) -> list[Tensor]:
        """[T] of each, on the CPU; each rank computes some."""
        number = {id(micro): i for i, micro in enumerate(micros)}
        own, idle = self._share_out(micros)
        found = [(number[id(m)], self.critic(m.to(self.critic.device)).cpu()) for m in own]
        for micro in idle:
            self.critic(micro.to(self.critic.device))
        found = self.ranks.gather(found)
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def _gae(self, micro: MicroBatch, value: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.ones_like(micro.sequence, dtype=torch.bool)
        last[:-1] = micro.sequence[1:] != micro.sequence[:-1]
        reward = torch.where(last, micro.advantage, 0)  # what a completion earns comes with its last token
        return gae(reward, value, micro.sequence, self.how.gamma, self.how.lam)

    def _update(self, batch: Batch) -> Lesson:
        """Take one optimiser step, unless the gradient is not finite."""
        parameters = list(self.critic.trainable().values())
        self.optimizer.zero_grad(set_to_none=True)
        own, idle = self._share_out(batch.micro_batches)
        found = [self._backward(micro) for micro in own]
        for micro in idle:
            self._backward(micro)
        self.critic.reduce_gradients(self.ranks)
        found = self.ranks.gather(found)
        norm = take_step(self.optimizer, parameters, self.how.learning_rate, self.max_grad_norm)
        n_tokens = sum(len(micro.target) for micro in batch.micro_batches)
        loss, clipped = sum(share for share, _ in found), sum(n for _, n in found)
        return Lesson(loss, norm, clipped, n_tokens, taken=math.isfinite(norm))

    def _share_out(self, micros: Sequence[MicroBatch]) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """This rank's own, and those that count nothing, which it must do for the others' sake."""
        own, idle = share_out(micros, self.ranks)
        return own, idle if self.critic.equal_passes else []

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
