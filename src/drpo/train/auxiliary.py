"""Losses that a run adds to its objective's: KL to a frozen reference model (k2) and an entropy bonus."""

from dataclasses import dataclass

import torch

from drpo.model.policy import Policy
from drpo.objectives import Objective, entropy_bonus, needed_divergence, reference_kl
from drpo.objectives.contract import ask, gradient_of
from drpo.ops import PolicyLoss
from drpo.types import MicroBatch


@dataclass(frozen=True, eq=False)
class AuxiliaryLosses:
    """Losses per token, added to the objective's.

    Args:
        reference: the frozen model, or None if its coefficient is 0.
        kl: coefficient of KL(pi || reference), >= 0.
        entropy: coefficient of the entropy bonus, >= 0.
    """

    reference: Policy | None
    kl: float
    entropy: float

    def loss(self, policy: Policy, micro: MicroBatch, objective: Objective) -> PolicyLoss:
        """Return what `Policy.loss` does, with these losses added to every token's."""
        kind = needed_divergence(objective.needs)
        divergence = None
        if kind is None:
            logp, entropy = policy(micro)
        else:
            logp, entropy, divergences = policy.divergence(micro, (kind,))
            divergence = divergences[kind]
        tokens = micro.tokens(logp, divergence)
        result = ask(objective, tokens)
        extra = entropy_bonus(entropy, self.entropy)
        if self.reference is not None:
            with torch.no_grad():
                reference_logp, _ = self.reference(micro)
            extra = extra + self.kl * reference_kl(logp, reference_logp, micro.behavior_logp)
        loss = (micro.weight * result.loss).sum() + (micro.weight * extra).sum()
        gradient = gradient_of(objective, result, tokens)
        return PolicyLoss(loss, logp.detach(), entropy.detach(), gradient, result.metrics, divergence)
