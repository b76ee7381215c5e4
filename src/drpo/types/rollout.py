"""The records of a rollout: Request -> Generation -> Episode -> ScoredGroup.

Letters in shapes: P prompt tokens, N tokens after the prompt, M sampled ones of them, G episodes of one problem.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from drpo.errors import BrokenLogpError, InputError
from drpo.types.problem import Failure, FinishReason, Message, Problem, RewardResult, Transcript
from drpo.types.sampling import Sampling
from drpo.types.tokens import TopK

Key: TypeAlias = tuple[int | str, ...]
"""Names a stream of random numbers; see `drpo.seeds.derive`."""


@dataclass(frozen=True, eq=False)
class Request:
    """One row for an engine to sample.

    Args:
        prompt_ids: [P] int64, P >= 1.
        sampling: the distribution to sample from; `samples` is not read, since a request is one row.
        stop: ids of the tokens that end it.
        key: of its random numbers, which depend on nothing else.
        name: what error messages call it.
    """

    prompt_ids: Tensor
    sampling: Sampling
    stop: frozenset[int]
    key: Key
    name: str = "request"


@dataclass(frozen=True, eq=False)
class Generation:
    """What an engine sampled for one request.

    Args:
        token_ids: [N] int64, N >= 1; ending with the stop token where there is one, never padding.
        behavior_logp: [N] float32, nats, <= 0; the sampler's log-probability of each of `token_ids`.
        finish_reason: "stop" or "length".
        version: of the weights that sampled it, as `Engine.load_weights` received it.
        top_logprobs: the sampler's most probable tokens at each of the N positions; None where none were asked for.

    Raises:
        BrokenLogpError: log-probabilities that are missing, NaN, infinite or positive, or not one per token; a
            `top_logprobs` that has not N rows of as many columns, or whose log-probabilities are NaN or positive.

    Example:
        >>> Generation(torch.tensor([7, 0]), torch.tensor([-0.5, 0.25]), "stop", version=0)
        Traceback (most recent call last):
        ...
        drpo.errors.BrokenLogpError: behavior_logp[1]=0.25 (token id 0); it must be finite and <= 0, so the sampler's \
logits are broken or were not reported
    """

    token_ids: Tensor
    behavior_logp: Tensor
    finish_reason: FinishReason
    version: int
    top_logprobs: TopK | None = None

    def __post_init__(self) -> None:
        if self.behavior_logp is None:
            raise BrokenLogpError("behavior_logp is missing; the engine must report log mu of every sampled token")
        if self.token_ids.numel() == 0 or self.behavior_logp.shape != self.token_ids.shape:
            raise BrokenLogpError(
                f"{self.token_ids.numel()} token_ids but {self.behavior_logp.numel()} behavior_logp; "
                "there must be one of each for every token, and at least one token"
            )
        wrong = ~torch.isfinite(self.behavior_logp) | (self.behavior_logp > 0)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise BrokenLogpError(
                f"behavior_logp[{at}]={self.behavior_logp[at].item()} (token id {int(self.token_ids[at])}); "
                "it must be finite and <= 0, so the sampler's logits are broken or were not reported"
            )
        if self.top_logprobs is not None:
            self.top_logprobs.require(len(self.token_ids), self.top_logprobs.ids.shape[-1])


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Token ids as the model read and sampled them: a prompt, and what followed it.

    Of the N tokens behind the prompt M were sampled; the others came from outside, between two turns.

    Args:
        prompt_ids: [P] int64; the prompt as the model read it.
        token_ids: [N] int64; the last of them is sampled.
        sampled: [N] bool; True for the M tokens that the model sampled, M >= 1.
        behavior_logp: [M] float32, nats, <= 0; the sampler's log-probability of each.
        version: [M] int64; of the weights that sampled each: the number of rollouts trained on before.
        top_logprobs: the sampler's most probable tokens at each of the M, where `sampling.top_logprobs` asks for them.
    """

    prompt_ids: Tensor
    token_ids: Tensor
    sampled: Tensor
    behavior_logp: Tensor
    version: Tensor
    top_logprobs: TopK | None = None

    @staticmethod
    def of(prompt_ids: Tensor, generation: Generation) -> "TokenSequence":
        """One turn: all that follows the prompt was sampled."""
        ids = generation.token_ids
        version = torch.full_like(ids, generation.version)
        return TokenSequence(
            prompt_ids, ids, torch.ones_like(ids, dtype=torch.bool), generation.behavior_logp, version,
            generation.top_logprobs,
        )  # fmt: skip

    @property
    def n_sampled(self) -> int:
        """M."""
        return len(self.behavior_logp)


@dataclass(frozen=True, eq=False)
class Episode:
    """One attempt at a problem, from its prompt to its end.

    Args:
        problem_id: `Problem.id` of the question.
        sample: which of the group's samples, 0 .. G-1.
        messages: those exchanged, from the first to the model's last.
        prompt: the first turn's prompt as the model read it, decoded with its special tokens; for people.
        text: the last turn's tokens decoded without special tokens, for rewards and people; never encoded again.
        finish_reason: of the last turn: "stop" where a stop token ended it, "length" where the limit of tokens did.
        sampling: the distribution it was sampled from.
        turns: sampled tokens of each turn, in order.
        sequences: of token ids; more than one only where a turn's prompt did not go on where the turn before ended.
    """

    problem_id: str
    sample: int
    messages: tuple[Message, ...]
    prompt: str
    text: str
    finish_reason: FinishReason
    sampling: Sampling
    turns: tuple[int, ...]
    sequences: tuple[TokenSequence, ...]

    @property
    def n_sampled(self) -> int:
        """Sampled tokens of all turns."""
        return sum(self.turns)

    @property
    def transcript(self) -> Transcript:
        """It as a reward reads it."""
        return Transcript(self.problem_id, self.messages, self.text, self.finish_reason, self.turns)

    @property
    def version(self) -> int:
        """Of the oldest weights that sampled a token of it."""
        return min(int(s.version.min()) for s in self.sequences)

    @property
    def sequence(self) -> TokenSequence:
        """The token ids of an episode that never branched: what rollouts.jsonl and checkpoints have room for.

        Raises:
            InputError: it has several sequences.
        """
        if len(self.sequences) != 1:
            raise InputError(
                f"episode {self.sample} of problem {self.problem_id!r} has {len(self.sequences)} sequences of tokens; "
                "only episodes of one can be recorded and resumed"
            )
        return self.sequences[0]


@dataclass(frozen=True, eq=False)
class Unscored:
    """An episode that its reward did not score.

    Args:
        episode: it.
        failure: why its reward failed; None where the reward abstained (returned None).
    """

    episode: Episode
    failure: Failure | None


@dataclass(frozen=True, eq=False)
class ScoredGroup:
    """The scored episodes of one problem.

    Args:
        problem: the question.
        episodes: the n <= G that have a reward.
        results: the reward of each; all numbers are finite.
        unscored: the other G - n, which take no part in the advantages or the loss.
        scored_zero: of the n, those on which the reward failed, and that therefore score 0.
    """

    problem: Problem
    episodes: tuple[Episode, ...]
    results: tuple[RewardResult, ...]
    unscored: tuple[Unscored, ...] = ()
    scored_zero: tuple[Unscored, ...] = ()

    @property
    def rewards(self) -> Tensor:
        """[n] float32; the total of each scored episode."""
        return torch.tensor([result.total for result in self.results], dtype=torch.float32)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Of the reward, whatever became of the episodes."""
        return tuple(u.failure for u in (*self.unscored, *self.scored_zero) if u.failure is not None)

    @property
    def all_episodes(self) -> tuple[Episode, ...]:
        """All G, scored or not."""
        return (*self.episodes, *(u.episode for u in self.unscored))

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """Of the scored episodes, in order."""
        return tuple(s for e in self.episodes for s in e.sequences)
