"""The probe batch that most checks read: a few completions, with the log-probabilities of sampler and trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drpo.batch import BatchConfig, make_batches
from drpo.credit import advantages, group_credit
from drpo.model.decoder import decoder_of
from drpo.model.policy import Policy
from drpo.reductions import token_mean
from drpo.rollout import EpisodeDriver
from drpo.seeds import derive
from drpo.types import Episode, MicroBatch, Problem, RewardResult, Sampling, ScoredGroup, Tokens

RANKS = tuple(sorted({*range(1, 11), *(int(10 * 1.2**i) for i in range(26)), 20, 40, 50, 100}))  # to 953
"""Ranks k at which the mass beyond the k most likely tokens is recorded."""


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """T sampled tokens, completion by completion; every tensor is [T] except `beyond`, log-probabilities in nats.

    Args:
        completions: the completions.
        temperature: the requested sampling temperature.
        behavior_logp: reported by the engine.
        logp: computed by the trainer: packed, shared prompts, fused head.
        plain: computed by the plain model at the temperature: one row per completion, no sharing, all logits.
        raw: `plain` at temperature 1.
        entropy: of the plain distribution.
        spread: variance of log p under the plain distribution.
        tail: mass of the less likely tokens, plus a random share of this token's: uniform on [0, 1] if the tokens
            follow the distribution.
        rank: number of more likely tokens.
        beyond: [T, R] mass beyond the k most likely tokens, k in `RANKS`.
        stops: [T] probability that this token ends the completion.
    """

    completions: tuple[Episode, ...]
    temperature: float
    behavior_logp: Tensor
    logp: Tensor
    plain: Tensor
    raw: Tensor
    entropy: Tensor
    spread: Tensor
    tail: Tensor
    rank: Tensor
    beyond: Tensor
    stops: Tensor

    def __len__(self) -> int:
        return len(self.logp)

    @property
    def tokens(self) -> Tokens:
        """The T tokens as an objective receives them, with advantage 1."""
        one = torch.ones_like(self.logp)
        return Tokens(self.logp, self.behavior_logp, one, one.bool(), torch.zeros_like(one, dtype=torch.int64))


def gather(
    policy: Policy, driver: EpisodeDriver, problems: Sequence[Problem], sampling: Sampling, seed: int
) -> ProbeBatch:
    """Sample completions and compute both sides' log-probabilities. Policy and engine must have the same weights.

    Args:
        policy: the model in training, at the sampling temperature.
        driver: the rollout driver.
        problems: the problems to sample for.
        sampling: at least 2 samples per problem.
        seed: of the sampling.
    """
    completions = [e for group in driver.run(problems, sampling, ("doctor", seed)) for e in group]
    with torch.no_grad():
        logp = trainer_logp(policy, completions)
        distributions = [
            _figures(c, logits, sampling.temperature, sorted(driver.stop))
            for c, logits in zip(completions, plain_logits(policy, completions), strict=True)
        ]
    columns = {name: torch.cat([figures[name] for figures in distributions]) for name in distributions[0]}
    return ProbeBatch(
        completions=tuple(completions),
        temperature=sampling.temperature,
        behavior_logp=torch.cat([c.sequence.behavior_logp for c in completions]),
        logp=torch.cat(logp),
        **columns,
    )


@contextmanager
def at_temperature(policy: Policy, temperature: float) -> Iterator[None]:
    """Set the policy's temperature inside the block."""
    previous, policy.temperature = policy.temperature, temperature
    try:
        yield
    finally:
        policy.temperature = previous


def micro_batches(policy: Policy, completions: Sequence[Episode], micro_batch_tokens: int = 4096) -> list[MicroBatch]:
    """Return completions as the trainer's micro-batches; requires at least two per problem."""
    ids = dict.fromkeys(c.problem_id for c in completions)
    by_problem = [tuple(c for c in completions if c.problem_id == i) for i in ids]
    groups = [
        ScoredGroup(Problem.of_text(c[0].problem_id, "", ""), c, tuple(RewardResult(i % 2) for i in range(len(c))))
        for c in by_problem
    ]
    config = BatchConfig(
        updates=1,
        reduction=token_mean,
        micro_batch_tokens=micro_batch_tokens,
        skip_zero_advantage=False,
        share_prompts=policy.shares_prompts,
    )
    credits = group_credit(groups, advantage=advantages.mean)
    return [m.to(policy.device) for batch in make_batches(groups, credits, config) for m in batch.micro_batches]


def trainer_logp(policy: Policy, completions: Sequence[Episode]) -> list[Tensor]:
    """Return each completion's log-probabilities [N] as the trainer computes them, on the CPU."""
    micros = micro_batches(policy, completions)
    return by_completion(micros, [policy(m)[0].float() for m in micros])


def by_completion(micros: Sequence[MicroBatch], columns: Sequence[Tensor]) -> list[Tensor]:
    """Split a column, in the order of the micro-batches, into each completion's part [N], on the CPU."""
    column, row = torch.cat(list(columns)).cpu(), torch.cat([m.row for m in micros]).cpu()
    return [column[row == i] for i in range(int(row.max()) + 1)]


def plain_logits(policy: Policy, completions: Sequence[Episode]) -> Iterator[Tensor]:
    """Yield the logits [N, V], float32, of each completion's tokens, computed with one row per completion."""
    head = policy.head
    rounded = replace(head, weight=head.weight.to(policy.dtype).float())
    for _, same in groupby(completions, key=lambda c: c.problem_id):
        rows = [c.sequence for c in same]
        # Padding is on the right: causal attention does not read it.
        ids = pad_sequence([torch.cat([s.prompt_ids, s.token_ids]) for s in rows], batch_first=True).to(policy.device)
        with torch.autocast(policy.device.type, policy.dtype, enabled=policy.dtype != torch.float32):
            hidden = decoder_of(policy.model)(input_ids=ids, use_cache=False).last_hidden_state
        for s, row in zip(rows, hidden, strict=True):
            start = len(s.prompt_ids) - 1
            yield rounded.logits(row[start : start + len(s.token_ids)].to(policy.dtype).float()).cpu()


def chosen_logp(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities [N] of tokens [N] under softmax(logits / temperature)."""
    return torch.log_softmax(logits / temperature, dim=-1).gather(-1, token_ids[:, None])[:, 0]


def _figures(c: Episode, logits: Tensor, temperature: float, stop: Sequence[int]) -> dict[str, Tensor]:
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    p = log_p.exp()
    chosen = p.gather(-1, c.sequence.token_ids[:, None])
    entropy = -(p * log_p.clamp(min=-1e3)).sum(-1)
    u = torch.rand(len(p), generator=torch.Generator().manual_seed(derive("tail", c.problem_id, c.sample)))
    cumulative = p.topk(min(RANKS[-1], p.shape[-1]), dim=-1).values.cumsum(-1)
    beyond = [1 - cumulative[:, k - 1] if k < p.shape[-1] else torch.zeros(len(p)) for k in RANKS]
    return {
        "plain": log_p.gather(-1, c.sequence.token_ids[:, None])[:, 0],
        "raw": chosen_logp(logits, c.sequence.token_ids, 1.0),
        "entropy": entropy,
        "spread": (p * log_p.clamp(min=-1e3) ** 2).sum(-1) - entropy**2,
        "tail": (p * (p < chosen)).sum(-1) + u * (p * (p == chosen)).sum(-1),
        "rank": (p > chosen).sum(-1),
        "beyond": torch.stack(beyond, dim=-1).clamp(min=0),
        "stops": p[:, list(stop)].sum(-1),
    }
