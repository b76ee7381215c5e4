"""Scored groups -> what each sampled token is credited with, before anything is batched."""

from drpo.credit.rules import CreditRule, credit_rule, gae_credit, group_credit

__all__ = ["CreditRule", "credit_rule", "gae_credit", "group_credit"]
