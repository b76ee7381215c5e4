"""Problems -> requests to an engine -> episodes; the only module that knows both problems and tokens.

An episode goes in turns. What the model samples is kept as ids and never encoded again; what the environment replies is
put behind it by the chat template's own glue (`drpo.rollout.glue`). Turns are sampled in rounds: the first turns of all
episodes, then the second turns of those that go on, and so on. So what is batched together depends on no clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.rollout.conversation import Conversation
from drpo.rollout.engine import Engine
from drpo.rollout.native_calls import native_calls
from drpo.rollout.prompts import PromptLimits, encode_prompt, encode_prompts
from drpo.rollout.tools import with_tools
from drpo.rollout.turn_ends import stop_ids
from drpo.types import Episode, Failure, Generation, Key, Problem, Request, Sampling
from drpo.types.calls import Call, MalformedCall
from drpo.types.environment import Observation, StepResult, Turn


@dataclass(frozen=True)
class EpisodeLimits:
    """When an episode ends, whatever its environment says; None is no limit.

    Args:
        turns: after so many turns of the model.
        tokens: where one more turn could bring it above so many sampled tokens.
    """

    turns: int | None = None
    tokens: int | None = None

    def reached(self, turns: int, tokens: int, sampling: Sampling) -> bool:
        """Whether there is no further turn after so many turns and sampled tokens."""
        enough = self.turns is not None and turns >= self.turns
        return enough or (self.tokens is not None and tokens + sampling.max_new_tokens > self.tokens)


class Environments(Protocol):
    """Holds the environments of many episodes, wherever they run; an episode is known by its number."""

    @property
    def max_turns(self) -> int:
        """After so many turns an episode ends."""
        ...

    def open(self, problems: Sequence[Problem]) -> list[Observation | Failure]:
        """Open an episode for each problem, numbered from 0, and return what the model reads first."""
        ...

    def step(self, turns: Mapping[int, Turn]) -> dict[int, StepResult | Failure]:
        """Return what each episode's environment answers to its turn."""
        ...

    def close(self) -> None:
        """Close every episode; others may be opened afterwards."""
        ...

    def __enter__(self) -> "Environments":
        """Start what episodes run in."""
        ...

    def __exit__(self, *_: object) -> None:
        """End it."""
        ...


@dataclass(frozen=True, eq=False)
class EpisodeDriver:
    """Runs episodes of problems with an engine.

    Args:
        engine: samples the tokens.
        tokenizer: encodes prompts, with the model's chat template, and decodes sampled tokens.
        stop: token ids that end a turn.
        limits: the limits of prompts that the model can read.
        environments: answer the model's turns; None where every episode is one turn.
        episode_limits: end episodes; the environments have a limit of turns besides.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    limits: PromptLimits
    environments: Environments | None = None
    episode_limits: EpisodeLimits = EpisodeLimits()

    @staticmethod
    def of(
        engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
    ) -> "EpisodeDriver":
        """The driver of an engine that samples from a model.

        Args:
            engine: it.
            model: its weights and generation defaults.
            tokenizer: the model's.
            stop: as for `stop_ids`.

        Raises:
            InputError: the model depends on the longest position of a batch in a way of its own, or `stop_ids` refuses
                a token.
        """
        return EpisodeDriver(engine, tokenizer, stop_ids(model, tokenizer, stop), PromptLimits.of(model))

    def run(self, problems: Sequence[Problem], sampling: Sampling, key: Key) -> list[tuple[Episode, ...]]:
        """Return the episodes of every problem: `sampling.samples` of each, in order.

        Args:
            problems: with unique ids.
            sampling: the distribution to sample from, turn by turn.
            key: of the random numbers; those of an episode's first turn depend on it, the problem's id and the sample's
                number, those of turn t > 0 on t besides.

        Raises:
            InputError: the model cannot read a prompt, or the engine's answer cannot be used.
        """
        try:
            conversations = self._begin(problems, sampling)
            going_on, turn = [c for c in conversations if c.failure is None], 0
            while going_on:
                self._sample(going_on, sampling, key, turn)
                turn += 1
                going_on = self._answered(going_on, sampling, turn)
        finally:
            if self.environments is not None:
                self.environments.close()
                self.engine.release()
        episodes = iter([c.episode() for c in conversations])
        return [tuple(islice(episodes, sampling.samples)) for _ in problems]

    def _begin(self, problems: Sequence[Problem], sampling: Sampling) -> list[Conversation]:
        """The conversations of all episodes, each up to where the model speaks first."""
        rows = [(p, i) for p in problems for i in range(sampling.samples)]
        if self.environments is None:
            prompts = encode_prompts(self.tokenizer, self.limits, problems, sampling)
            shown = [self.tokenizer.decode(ids) for ids in prompts]  # batch_decode makes a text of no prompts
            read = zip(problems, prompts, shown, strict=True)
            per_row = [(p.messages, ids, text) for p, ids, text in read for _ in range(sampling.samples)]
            return [
                Conversation(n, p, i, sampling, messages, (), ids, text, in_environment=False)
                for n, ((p, i), (messages, ids, text)) in enumerate(zip(rows, per_row, strict=True))
            ]
        opened = self.environments.open([p for p, _ in rows])
        return [self._opened(n, p, i, sampling, o) for n, ((p, i), o) in enumerate(zip(rows, opened, strict=True))]

    def _opened(
        self, number: int, problem: Problem, sample: int, sampling: Sampling, opened: Observation | Failure
    ) -> Conversation:
        """A conversation that begins with what its environment says; one that cannot be read has failed."""
        observation = Observation(problem.messages) if isinstance(opened, Failure) else opened
        failure = opened if isinstance(opened, Failure) else None
        messages, tools = observation.messages, observation.tools
        prompt = torch.empty(0, dtype=torch.int64)
        if failure is None:
            try:
                messages, tools = with_tools(self.tokenizer, observation)
                read = Problem(problem.id, messages, problem.answer, problem.data)
                prompt = encode_prompt(self.tokenizer, read, tools)
                self.limits.require(read, prompt, sampling)
            except InputError as error:
                failure = Failure("raised", str(error))
        shown = self.tokenizer.decode(prompt)
        conversation = Conversation(
            number, problem, sample, sampling, messages, tools, prompt, shown, in_environment=True
        )
        if failure is not None:
            conversation.fail(failure)
        return conversation

    def _sample(self, conversations: Sequence[Conversation], sampling: Sampling, key: Key, turn: int) -> None:
        """Have the model take its next turn in each."""
        requests = [
            Request(
                c.context,
                sampling,
                self.stop,
                (*key, c.problem.id, c.sample, *([turn] if turn else [])),
                f"completion {c.sample} of problem {c.problem.id!r}" + (f", turn {turn}" if turn else ""),
                after=c.last_turn,
                goes_on=self._may_go_on(c, sampling, turn + 1),
            )
            for c in conversations
        ]
        generations = self.engine.generate(requests)
        texts = self.tokenizer.batch_decode([g.token_ids for g in generations], skip_special_tokens=True)
        for c, generation, text in zip(conversations, generations, texts, strict=True):
            c.speak(generation, text, self._native_calls(c, generation))

    def _native_calls(self, conversation: Conversation, generation: Generation) -> Sequence[Call | MalformedCall]:
        if not conversation.tools:
            return ()
        said, before = generation.token_ids.tolist(), conversation.context.tolist()
        return native_calls(self.tokenizer, said, conversation.tools, before)

    def _may_go_on(self, conversation: Conversation, sampling: Sampling, turns: int) -> bool:
        """Whether there may be a further turn after so many."""
        if self.environments is None or turns >= self.environments.max_turns:
            return False
        return not self.episode_limits.reached(turns, conversation.n_sampled, sampling)

    def _answered(self, conversations: Sequence[Conversation], sampling: Sampling, turns: int) -> list[Conversation]:
        """Let the environments answer after so many turns; return the conversations that go on."""
        if self.environments is None:
            return []
        enough = turns >= self.environments.max_turns
        ended = {c.number: c for c in conversations if c.finish_reason == "stop"}
        results = self.environments.step({n: c.turn for n, c in ended.items()})
        for number, result in results.items():
            if isinstance(result, Failure):
                ended[number].fail(result)
            else:
                c = ended[number]
                last = enough or self.episode_limits.reached(turns, c.n_sampled, sampling)
                c.hear(result, self.tokenizer, self.stop, last=last)
        return [c for c in ended.values() if c.goes_on and not self.limits.too_long(c.context, sampling)]
