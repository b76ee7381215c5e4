"""The advantage-weighted likelihood, without a ratio; and the squared log-ratio, a term to add to an objective."""

from dataclasses import dataclass
from typing import ClassVar

from drpo.objectives.closed_form import token_loss
from drpo.objectives.ratios import MAX_LOG_RATIO, log_ratio, wide
from drpo.types import TokenLoss, Tokens


@dataclass(frozen=True)
class Reinforce:
    """The advantage-weighted likelihood: REINFORCE on stale data, without a correction.

        loss = -A l     w = 1/r

    Alone it takes the sampler for the policy. It is the base of what corrects or anchors it by itself:
    `reinforce*weight('sequence', 2)` (truncated importance sampling of a sequence), `reinforce + 0.1*k2` (DRO, Kimi).

    Returns:
        On a call: TokenLoss with loss [T].

    Example:
        >>> Reinforce()
        Reinforce()

    Source: Williams 1992; as a base: verl's rollout correction in bypass mode, DRO (arXiv 2405.19107), Kimi k1.5
    (2501.12599).
    """

    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp, _, advantage = wide(tokens)
        return token_loss(tokens, value=-advantage * logp, slope=-advantage)


@dataclass(frozen=True)
class K2:
    """The squared log-ratio to the sampler, whatever the advantage: a term that pulls every token back.

        loss = (l - m)^2 / 2     d loss / d l = l - m

    The log-ratio is capped at 20 nats either way: beyond, the pull stays 20. It is a term, not an objective of its own:
    `reinforce + 0.1*k2` is DRO with beta = 0.1, `mask(0.1) + 0.002*k2` is prime-rl's IPO with kl_tau = 0.001, whose
    square is not halved. Tokens with A = 0 have a gradient too, so none is skipped.

    Returns:
        On a call: TokenLoss with loss [T].

    Example:
        >>> K2().vanishes_at_zero_advantage
        False

    Source: DRO, arXiv 2405.19107; Kimi k1.5, 2501.12599, and K2.5, 2602.02276; k2: J. Schulman, "Approximating KL
    divergence" (2020).
    """

    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        gap = log_ratio(tokens).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return token_loss(tokens, value=gap.square() / 2, slope=gap)
