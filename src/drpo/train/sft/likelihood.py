"""The objective of supervised fine-tuning, and the batch of an update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from drpo.batch import BatchConfig, make_batches
from drpo.reductions import token_mean
from drpo.types import Batch, Credit, ScoredGroup, TokenLoss, Tokens


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """-log pi of each trained token; advantage and sampler play no part.

    Example:
        >>> one = torch.ones(1)
        >>> NegativeLogLikelihood()(Tokens(-2 * one, 0 * one, one, one.bool(), one.long())).loss
        tensor([2.])
    """

    tokenwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(-tokens.logp)


def likelihood_batch(
    groups: Sequence[ScoredGroup], micro_batch_tokens: int, share_prompts: bool = True, ranks: int = 1
) -> Batch:
    """Return the batch of an update: every trained token of its conversations has the weight 1 / their number.

    Args:
        groups: conversations, at least one.
        micro_batch_tokens, share_prompts, ranks: see `BatchConfig`.
    """
    credits = [Credit(s, torch.ones(s.n_sampled)) for group in groups for s in group.sequences]
    config = BatchConfig(
        updates=1,
        reduction=token_mean,
        micro_batch_tokens=micro_batch_tokens,
        skip_zero_advantage=False,
        share_prompts=share_prompts,
        ranks=ranks,
        sequence="row",
    )
    (batch,) = make_batches(groups, credits, config)
    return batch
