"""Adapters: token-wise objectives inside the losses of other frameworks, one module per framework.

A framework that computes `-min(r A', clip(r) A')` with its clip switched off and `old := mu` has exactly an objective's
gradient when A' is `reweight(objective, ...)`. A framework that accepts a loss function receives `token_loss(...)`. In
both cases its masks, normalisers, KL and entropy terms are unchanged. An adapter imports only torch, drpo's mathematics
and its framework; no other package imports the adapters.
"""

from drpo.adapters.record import LossRecord, require_ran
from drpo.adapters.weighing import behavior_or_policy, figures, objective_of, reweight, token_loss, warn_untested

__all__ = [
    "LossRecord",
    "behavior_or_policy",
    "figures",
    "objective_of",
    "require_ran",
    "reweight",
    "token_loss",
    "warn_untested",
]
