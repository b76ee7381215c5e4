"""Statistics of tokens that no training pass has seen."""

from torch import Tensor

from drpo.objectives import Objective, Tokens
from drpo.objectives.contract import value_and_gradient
from drpo.types import TokenStats


def stats_of_tokens(objective: Objective, tokens: Tokens, entropy: Tensor) -> TokenStats:
    """Return what a pass with this objective would have seen."""
    loss, gradient = value_and_gradient(objective, tokens)
    return TokenStats(tokens, entropy, gradient, loss.metrics)
