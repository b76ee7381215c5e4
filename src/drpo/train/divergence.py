"""Exact divergences of a policy from its sampler, over the whole vocabulary, at every token of a few completions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drpo.batch import pack
from drpo.errors import InputError
from drpo.model.policy import Policy
from drpo.types import Episode


@dataclass(frozen=True)
class ExactDivergence:
    """Divergences between the sampler's distributions p and the policy's q, over the tokens of some completions.

    Args:
        tokens: how many.
        tv_mean, tv_p99: of the total variation sum_v |p_v - q_v| / 2, in [0, 1]; mean and 99th percentile.
        kl_mean, kl_p99: of KL(p || q) = sum_v p_v log(p_v / q_v), nats.
    """

    tokens: int
    tv_mean: float
    tv_p99: float
    kl_mean: float
    kl_p99: float


@torch.no_grad()
def exact_divergence(policy: Policy, episodes: Sequence[Episode]) -> ExactDivergence:
    """Return the policy's exact divergence from the sampler over all tokens of the completions.

    Each sequence runs through the model alone, so the result does not depend on packing.

    Args:
        policy: at the temperature of the episodes.
        episodes: sampled with `sampling.top_logprobs` = V, the rows of the policy's head. V log-probabilities a
            token: a few hundred tokens suffice.

    Raises:
        InputError: no episodes, or an episode without the whole distribution or of another temperature.
    """
    if not episodes:
        raise InputError("exact_divergence: no completions; at least one is needed")
    vocab_size = policy.model.get_output_embeddings().weight.shape[0]
    for e in episodes:
        who = f"exact_divergence: completion {e.sample} of problem {e.problem_id!r}"
        if e.sampling.temperature != policy.temperature:
            raise InputError(f"{who}: sampled at temperature {e.sampling.temperature}, policy at {policy.temperature}")
        if any(s.top_logprobs is None or s.top_logprobs.ids.shape[1] != vocab_size for s in e.sequences):
            raise InputError(f"{who}: sample with sampling.top_logprobs={vocab_size}, the size of the vocabulary")
    columns = []
    for sequence in (s for e in episodes for s in e.sequences):
        (micro,) = pack([sequence], micro_batch_tokens=1).micro_batches
        _, _, by_kind = policy.divergence(micro.to(policy.device), ("topk_tv", "topk_kl"))
        columns.append(torch.stack([by_kind["topk_tv"], by_kind["topk_kl"]]).cpu().double())
    tv, kl = torch.cat(columns, 1)
    return ExactDivergence(
        tokens=len(tv),
        tv_mean=float(tv.mean()),
        tv_p99=float(tv.quantile(0.99)),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
    )
