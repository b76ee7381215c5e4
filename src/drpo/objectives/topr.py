"""TOPR: the likelihood of successes, and a truncated ratio on failures."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from drpo.errors import InputError
from drpo.objectives._check import require, require_one_of
from drpo.objectives.closed_form import token_loss
from drpo.objectives.factors import RATIOS, log_of_ratio
from drpo.objectives.ratios import wide
from drpo.types import TokenLoss, Tokens


@dataclass(frozen=True)
class TOPR:
    """Tapered off-policy REINFORCE: successes are followed without a ratio, failures with a ratio of at most 1.

        loss = -a A l                   score > 0         w = a / r
        loss = -c A sg(min(x, 1)) l     else              w = c min(x, 1) / r

    The score is the reward of the token's episode, not its advantage: a success that is below its group's mean is
    pushed down, without a ratio. x is the token's r, or a ratio of its sequence. A failure that the policy has given up
    fades; a success is never given up, however far the policy is from it.

    Args:
        positive: a, > 0.
        negative: c, > 0.
        over: "token" (ROLL), "sequence" (the paper: the product of the sequence's ratios), or "geometric" (their mean).

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: a parameter out of its range; on a call, `tokens.score` is missing.

    Example:
        >>> TOPR()
        TOPR(positive=1.0, negative=1.0, over='token')

    Source: Tapered Off-Policy REINFORCE, arXiv 2503.14286; ROLL's `topr`, whose ratio is the token's.
    """

    positive: float = 1.0
    negative: float = 1.0
    over: str = "token"
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"score"})

    def __post_init__(self) -> None:
        require("positive", self.positive, above=0)
        require("negative", self.negative, above=0)
        require_one_of("over", self.over, RATIOS)

    @property
    def tokenwise(self) -> bool:
        """False where the ratio is a sequence's."""
        return self.over == "token"

    def __call__(self, tokens: Tokens) -> TokenLoss:
        if tokens.score is None:
            raise InputError("tokens.score is missing: topr tells successes from failures by their reward; fill it")
        logp, _, advantage = wide(tokens)
        tapered = self.negative * log_of_ratio(tokens, self.over).clamp(max=0).exp()
        slope = -advantage * torch.where(tokens.score > 0, self.positive, tapered)
        return token_loss(tokens, value=slope * logp, slope=slope)
