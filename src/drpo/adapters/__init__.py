"""Any token-wise objective inside the loss of another framework; one file for each, and what they share.

A framework that computes `-min(r A', clip(r) A')` with its clip switched off and `old := mu` has exactly an objective's
gradient when A' is `reweight(objective, ...)`; one that takes a whole loss function gets `token_loss(...)`. Either way
its own masks, normalisers, KL and entropy terms stay as they are. The files of frameworks import torch, drpo's
mathematics and their framework, nothing else, and no other room imports them.
"""

from drpo.adapters.weighing import behavior_or_policy, figures, objective_of, reweight, token_loss, warn_untested

__all__ = ["behavior_or_policy", "figures", "objective_of", "reweight", "token_loss", "warn_untested"]
