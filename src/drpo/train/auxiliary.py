"""Losses that a run adds to its objective's: KL to a frozen reference model (k2) and an entropy bonus."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drpo.objectives import Objective, entropy_bonus, needed_divergence, reference_kl, total
from drpo.policy import Policy
from drpo.types import MicroBatch, Tokens


@dataclass(frozen=True, eq=False)
class AuxiliaryLosses:
    """Losses of every token, beside the objective's.

    Args:
        reference: the frozen model, or None where its coefficient is 0.
        kl: coefficient of KL(pi || reference), >= 0.
        entropy: coefficient of the entropy bonus, >= 0.
    """

    reference: Policy | None
    kl: float
    entropy: float

    def loss(self, policy: Policy, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tokens, Tensor]:
        """As `Policy.loss`, with these losses added to every token's."""
        kind = needed_divergence(objective.needs)
        if kind is None:
            logp, entropy = policy(micro)
            tokens = micro.tokens(logp)
        else:
            logp, entropy, moved = policy.divergence(micro, (kind,))
            tokens = micro.tokens(logp, moved[kind])
        extra = entropy_bonus(entropy, self.entropy)
        if self.reference is not None:
            with torch.no_grad():
                reference_logp, _ = self.reference(micro)
            extra = extra + self.kl * reference_kl(logp, reference_logp, micro.behavior_logp)
        share = total(objective, tokens, micro.weight) + (micro.weight * extra).sum()
        return share, replace(tokens, logp=logp.detach()), entropy.detach()
