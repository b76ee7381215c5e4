"""The records that flow through drpo, each complete when made: Problem -> Episode -> ScoredGroup -> Credit -> Batch.

Letters in shapes: T tokens, G samples of one prompt, P prompt tokens, N completion tokens (of a micro-batch: places), S
completions of one optimiser batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from drpo.checks import require_columns
from drpo.errors import BrokenLogpError, InputError


@dataclass(frozen=True, eq=False)
class Tokens:
    """The T tokens of a batch, or of any part of one; every tensor has shape [T].

    Args:
        logp: log pi(token | context), nats, float32, at the sampling temperature; the only input with a gradient.
        behavior_logp: log mu(token | context), nats, <= 0, float32, as the sampler that drew the token reported it.
        advantage: how much better than its group the completion was; float32, reward units.
        keep: bool; True where the policy chose this token and it is trained.
        sequence: int64; which completion the token belongs to. Equal numbers mean the same completion.
        divergence: float32; the top-K divergence at this token that the objective's `needs` names, else None.

    Raises:
        InputError: a column of another shape, dtype or device; and, on the CPU, a kept token whose log-probability is
            NaN or positive (-inf is fine), whose advantage is not finite, or whose divergence is negative.

    Example:
        >>> t = Tokens(torch.tensor([-1.0]), torch.tensor([-1.1]), torch.tensor([1.0]),
        ...            torch.tensor([True]), torch.tensor([0]))
        >>> t.logp.shape
        torch.Size([1])
    """

    logp: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    keep: Tensor
    sequence: Tensor
    divergence: Tensor | None = None

    def __post_init__(self) -> None:
        columns = {name: values for name, values in vars(self).items() if name != "divergence" or values is not None}
        require_columns("tokens.", columns, ("logp", self.logp), self.keep)

    @staticmethod
    def cat(parts: "Sequence[Tokens]") -> "Tokens":
        """The tokens of all parts, in order; at least one part."""
        columns: dict[str, Any] = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Tokens)}
        joined: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
        return Tokens(**joined)


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """What an objective returns.

    Args:
        loss: [T], to be minimised, differentiable in `Tokens.logp`; not reduced, not weighted.
        metrics: name -> [T] detached; per-token figures that the trainer averages over kept tokens.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """One question with what is needed to mark an answer.

    Args:
        id: unique among the problems of one call to `Task.sample` or `Task.held_out`; seeds its samples.
        prompt: the user's message, text.
        answer: the reference answer, text; may be empty where the reward needs none.
        system: a system message, or None for the chat template's own.
        data: whatever else a scorer needs (JSON-like).
    """

    id: str
    prompt: str
    answer: str
    system: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; the temperature here is the only one there is, and scales both mu and pi.

    Args:
        samples: completions per prompt (the group size G), >= 1.
        max_new_tokens: longest completion, in tokens, >= 1.
        temperature: the logits are divided by it; > 0 in training, 0 means greedy and is for evaluation.
        top_p: keep the smallest set of tokens with at least this probability, (0, 1]; 1 in training.
        top_k: keep the k likeliest tokens; 0 means off; 0 in training.
        top_logprobs: report this many of the likeliest tokens beside each sampled one; what is drawn does not change.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> Sampling(samples=4, top_p=0.9).require_trainable()
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: sampling.top_p=0.9: training needs top_p=1, because the sampler's log-probabilities \
would not be those of the law that was sampled; set --sampling.top-p 1
    """

    samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"sampling.samples={self.samples}: must be at least 1")
        if self.max_new_tokens < 1:
            raise InputError(f"sampling.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"sampling.temperature={self.temperature}: must be finite and >= 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            raise InputError(f"sampling.top_k={self.top_k}: must be 0 (off) or positive")
        if self.top_logprobs < 0:
            raise InputError(f"sampling.top_logprobs={self.top_logprobs}: must be 0 (none) or positive")

    def require_trainable(self, least: int = 2) -> None:
        """Refuse a law that training cannot correct for: truncated support or temperature 0; or too few samples.

        Args:
            least: samples of a prompt; 1 where they are not compared with each other, but a critic gives advantages.
        """
        truncated = "because the sampler's log-probabilities would not be those of the law that was sampled"
        if self.top_p != 1:
            raise InputError(
                f"sampling.top_p={self.top_p}: training needs top_p=1, {truncated}; set --sampling.top-p 1"
            )
        if self.top_k != 0:
            raise InputError(
                f"sampling.top_k={self.top_k}: training needs top_k off, {truncated}; set --sampling.top-k 0"
            )
        if self.temperature == 0:
            raise InputError("sampling.temperature=0: training needs a temperature above 0; greedy is for evaluation")
        if self.samples < least:
            raise InputError(
                f"sampling.samples={self.samples}: an advantage compares the samples of one prompt; "
                "training needs at least 2, or a critic"
            )


@dataclass(frozen=True, eq=False)
class TopK:
    """The likeliest tokens at each of n places, as the sampler saw them.

    The token that was sampled is among them only where it is one of the likeliest.

    Args:
        ids: [n, K] int64, by falling probability; all different within a place.
        logp: [n, K] float32, nats, <= 0; the sampler's log-probability of each, under the law it draws from. -inf only
            where top-k or top-p rules the token out.
    """

    ids: Tensor
    logp: Tensor

    def at(self, places: "Tensor | slice") -> "TopK":
        """Those of some places: [m, K]."""
        return TopK(self.ids[places], self.logp[places])

    def to(self, device: torch.device) -> "TopK":
        """The same on another device."""
        return TopK(self.ids.to(device), self.logp.to(device))

    def require(self, n: int, k: int) -> None:
        """Check that these are log-probabilities of k tokens at each of n positions.

        Raises:
            BrokenLogpError: another shape, or a log-probability that is NaN or positive.
        """
        for name, column in vars(self).items():
            if column.shape != (n, k):
                raise BrokenLogpError(
                    f"top_logprobs.{name} {list(column.shape)}: must be {[n, k]}, a row for each token and a column "
                    "for each of sampling.top_logprobs"
                )
        wrong = ~(self.logp <= 0)  # a NaN is not <= 0
        if wrong.any():
            row, rank = wrong.nonzero()[0].tolist()
            raise BrokenLogpError(f"top_logprobs.logp[{row}, {rank}]={self.logp[row, rank].item()}; it must be <= 0")

    @staticmethod
    def cat(parts: "Sequence[TopK]") -> "TopK":
        """The places of all parts, in order; at least one part, all of the same K."""
        return TopK(torch.cat([p.ids for p in parts]), torch.cat([p.logp for p in parts]))


Key: TypeAlias = tuple[int | str, ...]
"""Names a stream of random numbers; see `drpo.seeds.derive`."""

FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a generation ended: a stop token, or `Sampling.max_new_tokens`."""


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


Message: TypeAlias = Mapping[str, Any]
"""What one side said: `role`, `content`."""


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
    def version(self) -> int:
        """Of the oldest weights that sampled a token of it."""
        return min(int(s.version.min()) for s in self.sequences)

    @property
    def sequence(self) -> TokenSequence:
        """The token ids of an episode that never branched."""
        (sequence,) = self.sequences
        return sequence


FailureKind: TypeAlias = Literal["raised", "timed_out", "died", "not_finite", "not_a_number"]
"""What can go wrong with a reward: it raised, it ran past its deadline, its process died, it returned NaN or an
infinity, or it returned something that is not a number: text, a list, an array."""


@dataclass(frozen=True)
class Failure:
    """Why a reward has no verdict. A failure is not a wrong answer.

    Args:
        kind: of the kinds that are counted.
        text: what happened, one line.
    """

    kind: FailureKind
    text: str


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
        rewards: [n] float32, finite.
        unscored: the other G - n, which take no part in the advantages or the loss.
        scored_zero: of the n, those on which the reward failed, and that therefore score 0.
    """

    problem: Problem
    episodes: tuple[Episode, ...]
    rewards: Tensor
    unscored: tuple[Unscored, ...] = ()
    scored_zero: tuple[Unscored, ...] = ()

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


@dataclass(frozen=True, eq=False)
class Credit:
    """What the M sampled tokens of one sequence are credited with.

    Args:
        sequence: whose they are.
        advantage: [M] float32.
        value: [M] float32, reward units; a critic's, of the context of each token, before it learns from the rollout;
            None without a critic, as `returns`.
        returns: [M] float32, reward units; what the values should have been.

    Raises:
        InputError: a column that has not one number for each sampled token.
    """

    sequence: TokenSequence
    advantage: Tensor
    value: Tensor | None = None
    returns: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.sequence.behavior_logp.shape
        for name in ("advantage", "value", "returns"):
            column = getattr(self, name)
            if column is not None and column.shape != shape:
                raise InputError(f"credit.{name} {list(column.shape)}: must be {list(shape)}, one for each token")


@dataclass(frozen=True)
class Layout:
    """Which places of a packed row attend to which: segments laid end to end.

    A place attends to its own segment up to itself, and to the whole of the segment that its own continues.

    Args:
        length: places in each segment, >= 1.
        prefix: the segment that each continues, or -1; a prefix has none itself.

    Example:
        >>> shared = Layout(length=(5, 2, 3), prefix=(-1, 0, 0))  # a prompt of 5 places and two answers to it
        >>> shared.positions().tolist(), shared.n_places
        ([0, 1, 2, 3, 4, 5, 6, 5, 6, 7], 10)
    """

    length: tuple[int, ...]
    prefix: tuple[int, ...]

    @property
    def n_places(self) -> int:
        """N, places in all."""
        return sum(self.length)

    def prefix_length(self, segment: int) -> int:
        """Places that stand before the segment's first."""
        return self.length[self.prefix[segment]] if self.prefix[segment] >= 0 else 0

    def positions(self) -> Tensor:
        """[N] int64; how many places each place's own sequence has before it."""
        return torch.cat([self.prefix_length(s) + torch.arange(n) for s, n in enumerate(self.length)])


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Completions that go through the model together, packed without padding, and the T tokens that are trained.

    The prompt of a group stands there once, however many of its completions follow.

    Args:
        input_ids: [N] int64; the segments of `layout`, end to end.
        layout: which places attend to which.
        position: [T] int64 in [0, N): where the hidden state stands that predicts the token.
        target: [T] int64; the sampled token ids.
        behavior_logp: [T] float32, nats.
        advantage: [T] float32.
        sequence: [T] int64 in [0, S), numbered through the whole optimiser batch.
        weight: [T] float32; what each token's loss counts, fixed over the whole optimiser batch.
        top: the sampler's likeliest tokens at each of the T, or None where it did not report them for all.
        value: [T] float32, as of `Credit`; None without a critic, as `returns`.
        returns: [T] float32, as of `Credit`.
    """

    input_ids: Tensor
    layout: Layout
    position: Tensor
    target: Tensor
    behavior_logp: Tensor
    advantage: Tensor
    sequence: Tensor
    weight: Tensor
    top: TopK | None = None
    value: Tensor | None = None
    returns: Tensor | None = None

    def tokens(self, logp: Tensor, divergence: Tensor | None = None) -> Tokens:
        """These tokens with the current policy's log-probabilities `logp` [T], and how far it has moved at each [T]."""
        keep = torch.ones_like(self.target, dtype=torch.bool)
        return Tokens(logp, self.behavior_logp, self.advantage, keep, self.sequence, divergence)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, top=None if self.top is None else self.top.to(device))


@dataclass(frozen=True, eq=False)
class Batch:
    """What one optimiser update trains on.

    Args:
        micro_batches: the completions that go through the model, split by token budget.
        credits: of the S completions of the update, skipped ones too; `MicroBatch.sequence` numbers them.
        n_tokens: kept tokens in the update, skipped ones too.
        n_skipped: completions whose every advantage, and so whose gradient, is exactly 0.
    """

    micro_batches: tuple[MicroBatch, ...]
    credits: tuple[Credit, ...]
    n_tokens: int
    n_skipped: int

    @property
    def n_sequences(self) -> int:
        """S; the normaliser counts the skipped ones too."""
        return len(self.credits)


@dataclass(frozen=True, eq=False)
class TokenStats:
    """What a pass over T trained tokens saw of each; all detached.

    Args:
        tokens: with `logp` as it was before the step.
        entropy: [T] nats, of the policy at each of them.
        gradient: [T], d (the objective's loss) / d logp, before the token's weight.
        metrics: name -> [T], the objective's own.
    """

    tokens: Tokens
    entropy: Tensor
    gradient: Tensor
    metrics: Mapping[str, Tensor]

    def cpu(self) -> "TokenStats":
        """The same on the CPU."""
        columns = {name: v.cpu() for name, v in vars(self.tokens).items() if v is not None}
        metrics = {name: v.cpu() for name, v in self.metrics.items()}
        return TokenStats(Tokens(**columns), self.entropy.cpu(), self.gradient.cpu(), metrics)

    @staticmethod
    def cat(parts: "Sequence[TokenStats]") -> "TokenStats":
        """The tokens of all parts, in order; at least one part."""
        named = [p for p in parts if p.metrics]  # of no tokens nothing is known
        return TokenStats(
            Tokens.cat([p.tokens for p in parts]),
            torch.cat([p.entropy for p in parts]),
            torch.cat([p.gradient for p in parts]),
            {name: torch.cat([p.metrics[name] for p in named]) for name in (named[0].metrics if named else ())},
        )

    @staticmethod
    def none(with_divergence: bool) -> "TokenStats":
        """Those of no tokens."""
        empty = torch.empty(0)
        tokens = Tokens(empty, empty, empty, empty.bool(), empty.long(), empty if with_divergence else None)
        return TokenStats(tokens, empty, empty, {})


@dataclass(frozen=True, eq=False)
class StepStats:
    """What one optimiser update saw and did; `drpo.train.metrics` turns it into figures.

    Args:
        token_stats: of the T trained tokens of the whole update, on the CPU.
        loss: the batch's loss, reward units.
        grad_norm: L2 norm of the whole gradient before clipping.
        learning_rate: of this step.
        taken: False where the gradient was not finite, so that no step was taken.
    """

    token_stats: TokenStats
    loss: float
    grad_norm: float
    learning_rate: float
    taken: bool = True

    @property
    def tokens(self) -> Tokens:
        """The T trained tokens."""
        return self.token_stats.tokens

    @property
    def entropy(self) -> Tensor:
        """[T] nats, of the policy at each of them."""
        return self.token_stats.entropy


@dataclass(frozen=True)
class CriticStats:
    """What one optimiser update of a critic saw and did.

    Args:
        loss: the batch's value loss.
        grad_norm: L2 norm of the whole gradient before clipping.
        clipped: tokens whose value had moved further than the clip.
        n_tokens: of the batch.
        taken: False where the gradient was not finite, so that no step was taken.
    """

    loss: float
    grad_norm: float
    clipped: int
    n_tokens: int
    taken: bool = True
