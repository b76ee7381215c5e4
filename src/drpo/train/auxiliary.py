"""Losses that a run adds to its objective's: KL to a frozen reference model (k2) and an entropy bonus."""

from dataclasses import dataclass

import torch

from drpo.model.policy import Policy
from drpo.objectives import Objective, entropy_bonus, needed_divergence, reference_kl
from drpo.objectives.contract import ask, gradient_of
from drpo.ops import PolicyLoss
from drpo.types import MicroBatch

KL = "reference_kl"
"""Name of the metric of the KL to the reference model."""


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
        """Return what `Policy.loss` does, with these losses added to every token's, and the KL as a metric."""
        kind = needed_divergence(objective.needs)
        divergence = None
        if kind is None:
            logp, entropy = policy(micro)
        else:
            logp, entropy, divergences = policy.divergence(micro, (kind,))
            divergence = divergences[kind]
        tokens = micro.tokens(logp, divergence)
        result = ask(objective, tokens)
        extra, metrics = entropy_bonus(entropy, self.entropy), dict(result.metrics)
        if self.reference is not None:
            with torch.no_grad():
                reference_logp, _ = self.reference(micro)
            kl = reference_kl(logp, reference_logp, micro.behavior_logp)
            extra, metrics[KL] = extra + self.kl * kl, kl.detach()
        loss = (micro.weight * result.loss).sum() + (micro.weight * extra).sum()
        gradient = gradient_of(objective, result, tokens)
        return PolicyLoss(loss, logp.detach(), entropy.detach(), gradient, metrics, divergence)
