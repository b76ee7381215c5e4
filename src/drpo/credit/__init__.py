"""Scored groups -> the advantage of each sampled token, before batching."""

from drpo.credit.rules import CreditRule, credit_rule, gae_credit, group_credit, teaches_nothing

__all__ = ["CreditRule", "credit_rule", "gae_credit", "group_credit", "teaches_nothing"]
