"""RefKL: the policy gradient of the KL to a reference model, a teacher's, masked where a token has fallen too far."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from drpo.errors import InputError
from drpo.objectives._check import require
from drpo.objectives.closed_form import token_loss
from drpo.objectives.ratios import LOWEST_LOGP, MAX_LOG_RATIO, prob_diff, ratio, wide
from drpo.types import TokenLoss, Tokens


@dataclass(frozen=True)
class RefKL:
    """On-policy distillation: the advantage of a token is how much likelier the reference model finds it.

        loss = -r sg(l_ref - l) where pi - mu >= -delta, else 0     d loss / d l = the same

    The tokens' own advantage is not read. Only the lower side is masked, whatever the sign of l_ref - l. The expected
    gradient of what is kept is that of KL(pi || reference), of each token given its context. l_ref - l is capped at 20
    nats either way. prime-rl adds its squared log-ratio: `ref_kl(0.2) + 0.002*k2`.

    Args:
        delta: > 0, in units of probability.

    Returns:
        On a call: TokenLoss with loss [T].

    Raises:
        InputError: `delta` is not a positive number; on a call, `tokens.reference_logp` is missing.

    Example:
        >>> sorted(RefKL(0.2).needs)
        ['reference_logp']

    Source: prime-rl, `ref_kl_loss_fn` at 559b447.
    """

    delta: float = 0.2
    tokenwise: ClassVar[bool] = True
    vanishes_at_zero_advantage: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reference_logp"})

    def __post_init__(self) -> None:
        require("delta", self.delta, above=0)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        if tokens.reference_logp is None:
            raise InputError(
                "tokens.reference_logp is missing: ref_kl follows a reference model; fill it with that model's "
                "log-probabilities"
            )
        logp, _, _ = wide(tokens)
        apart = tokens.reference_logp.to(logp.dtype).clamp(min=LOWEST_LOGP) - logp
        loss = -ratio(tokens) * apart.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * ~self.out_of_region(tokens)
        return token_loss(tokens, value=loss, slope=loss)

    def out_of_region(self, tokens: Tokens) -> Tensor:
        """Return [T] bool: pi - mu < -delta."""
        return prob_diff(tokens) < -self.delta
