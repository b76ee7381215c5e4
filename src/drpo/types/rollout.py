"""The records of a rollout: Request -> Generation -> Episode -> ScoredGroup.

Shapes: P prompt tokens, N tokens after the prompt, M of them sampled, G episodes of one problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from drpo.checks import all_equal
from drpo.errors import BrokenLogpError, InputError
from drpo.types.problem import Failure, FinishReason, Message, Problem, RewardResult, Transcript
from drpo.types.routes import Routes
from drpo.types.sampling import Sampling
from drpo.types.tokens import TopK

Key: TypeAlias = tuple[int | str, ...]
"""Identifies a stream of random numbers; see `drpo.seeds.derive`."""


@dataclass(frozen=True, eq=False)
class Request:
    """One row for an engine to sample.

    Args:
        prompt_ids: [P] int64, P >= 1.
        sampling: the distribution to sample from; `samples` is ignored, since a request is one row.
        stop: token ids that end it.
        key: seeds its random numbers, which depend on nothing else.
        name: its name in error messages.
        after: the generation that it continues: the prompt begins with that generation's prompt and tokens. None for a
            first turn, and for a prompt that was rendered anew.
        goes_on: if it ends at a stop token, a later request will probably continue it.

    Engines may ignore the last two, which say how to save work; they change no distribution.
    """

    prompt_ids: Tensor
    sampling: Sampling
    stop: frozenset[int]
    key: Key
    name: str = "request"
    after: "Generation | None" = None
    goes_on: bool = False


@dataclass(frozen=True, eq=False)
class Generation:
    """The tokens that an engine sampled for one request.

    Args:
        token_ids: [N] int64, N >= 1; includes the stop token, if any; no padding.
        behavior_logp: [N] float32, nats, <= 0; the sampler's log-probability of each of `token_ids`.
        finish_reason: "stop" or "length".
        version: the weights' version, as passed to `Engine.load_weights`.
        top_logprobs: the sampler's most probable tokens at each of the N positions, or None if not requested.
        routes: the experts that read the request's prompt and these N tokens; None unless the engine reports them.

    Raises:
        BrokenLogpError: log-probabilities that are missing, NaN, infinite or positive, or not one per token;
            `top_logprobs` of another shape than [N, K], or with log-probabilities that are NaN or positive.
        InputError: `routes` of another number of tokens.

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
    routes: Routes | None = None

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
        if self.routes is not None and len(self.routes.tokens) != len(self.token_ids):
            raise InputError(f"routes of {len(self.routes.tokens)} tokens for {len(self.token_ids)} token_ids")


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Token ids as the model read and sampled them: a prompt, and the N tokens after it.

    The model sampled M of the N tokens; the environment inserted the others between turns.

    Args:
        prompt_ids: [P] int64; the prompt as the model read it.
        token_ids: [N] int64; the last one is sampled.
        sampled: [N] bool; True for the M tokens that the model sampled, M >= 1.
        behavior_logp: [M] float32, nats, <= 0; the sampler's log-probability of each.
        version: [M] int64; the version of the weights that sampled each: the number of rollouts trained on before.
        top_logprobs: the sampler's most probable tokens at each of the M, if `sampling.top_logprobs` > 0.
        routes: the experts to replay for the P and the N tokens, or None.
        proximal_logp: [M] float32, nats; the policy's own log-probability of each before the updates of its rollout;
            None unless the objective needs it.
        reference_logp: [M] float32, nats; the reference model's log-probability of each; None likewise.
    """

    prompt_ids: Tensor
    token_ids: Tensor
    sampled: Tensor
    behavior_logp: Tensor
    version: Tensor
    top_logprobs: TopK | None = None
    routes: Routes | None = None
    proximal_logp: Tensor | None = None
    reference_logp: Tensor | None = None

    @staticmethod
    def of(prompt_ids: Tensor, generation: Generation) -> "TokenSequence":
        """Return the sequence of one turn: every token after the prompt is sampled."""
        ids = generation.token_ids
        version = torch.full_like(ids, generation.version)
        return TokenSequence(
            prompt_ids, ids, torch.ones_like(ids, dtype=torch.bool), generation.behavior_logp, version,
            generation.top_logprobs, generation.routes,
        )  # fmt: skip

    @property
    def n_sampled(self) -> int:
        """M."""
        return len(self.behavior_logp)


@dataclass(frozen=True)
class Played:
    """What an environment had to say of an episode.

    Args:
        rewards: of each turn, in order, finite.
        done: the environment ended the episode; else a limit did: of turns, or of tokens.
        calls: how many calls of tools could be read in each turn.
        failed_calls: how many of each turn could not be read or failed.
        failure: why the environment could not go on; None where it could.
    """

    rewards: tuple[float, ...]
    done: bool
    calls: tuple[int, ...] = ()
    failed_calls: tuple[int, ...] = ()
    failure: Failure | None = None


@dataclass(frozen=True, eq=False)
class Episode:
    """One attempt at a problem, from its prompt to its end.

    Args:
        problem_id: `Problem.id` of the question.
        sample: number in its group, 0 .. G-1.
        messages: the whole exchange, from the first message to the model's last.
        prompt: the first turn's prompt as the model read it, decoded with its special tokens; for people.
        text: the last turn's tokens decoded without special tokens, for rewards and people; never encoded again.
        finish_reason: the last turn's: "stop" for a stop token, "length" for the token limit.
        sampling: the distribution it was sampled from.
        turns: sampled tokens of each turn, in order.
        sequences: its token ids; more than one only if a turn's prompt does not continue the previous turn's tokens;
            none where its environment failed before the first turn.
        played: what its environment reported; None without an environment.
        attempt: how often its group had been sampled before (`--dynamic-sampling`).
        earlier: mean reward of its group at each of these times; empty unless a curriculum counts them.
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
    played: Played | None = None
    attempt: int = 0
    earlier: tuple[float, ...] = ()

    @property
    def n_sampled(self) -> int:
        """Sampled tokens of all turns."""
        return sum(self.turns)

    @property
    def transcript(self) -> Transcript:
        """The episode as a reward reads it."""
        return Transcript(self.problem_id, self.messages, self.text, self.finish_reason, self.turns)

    @property
    def version(self) -> int:
        """The oldest version among the weights that sampled its tokens, of which there is at least one."""
        return min(int(s.version.min()) for s in self.sequences)

    @property
    def sequence(self) -> TokenSequence:
        """The only sequence of an episode that never branched; rollouts.jsonl and checkpoints record one.

        Raises:
            InputError: the episode has several sequences.
        """
        if len(self.sequences) != 1:
            raise InputError(
                f"episode {self.sample} of problem {self.problem_id!r} has {len(self.sequences)} sequences of tokens; "
                "only episodes of one can be recorded and resumed"
            )
        return self.sequences[0]


@dataclass(frozen=True, eq=False)
class Unscored:
    """An episode without a score.

    Args:
        episode: the episode.
        failure: why its reward failed; None if the reward abstained (returned None).
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
        unscored: the other G - n; they enter neither the advantages nor the loss.
        scored_zero: those of the n whose reward failed and which therefore score 0.
        masked: those of the n that count in the group's advantages and are not trained (`drpo.credit.overlong`).
        usage: what the rewards of all G asked of endpoints, by name of the metric (`drpo.rewards.usage`).
    """

    problem: Problem
    episodes: tuple[Episode, ...]
    results: tuple[RewardResult, ...]
    unscored: tuple[Unscored, ...] = ()
    scored_zero: tuple[Unscored, ...] = ()
    masked: tuple[Episode, ...] = ()
    usage: Mapping[str, float] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """[n] float32; the whole reward of each scored episode: its total, and its turns' rewards."""
        return torch.tensor([result.whole for result in self.results], dtype=torch.float32)

    @property
    def equal_rewards(self) -> bool:
        """Whether the task's rewards of all n are equal (to 1e-6 of the largest), those of turns too."""
        return all_equal(self.rewards) and len({result.turns for result in self.results}) <= 1

    @property
    def failures(self) -> tuple[Failure, ...]:
        """All failures of the reward, of scored and unscored episodes."""
        return tuple(u.failure for u in (*self.unscored, *self.scored_zero) if u.failure is not None)

    @property
    def all_episodes(self) -> tuple[Episode, ...]:
        """All G, scored or not."""
        return (*self.episodes, *(u.episode for u in self.unscored))

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """The sequences of the scored episodes, in order."""
        return tuple(s for e in self.episodes for s in e.sequences)
