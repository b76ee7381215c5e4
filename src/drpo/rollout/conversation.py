"""One episode while it goes on: what was sampled, what was replied, and the token ids of both."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.rollout.chat_template import encode_messages
from drpo.rollout.glue import glue
from drpo.rollout.routes import joined
from drpo.types import Episode, Failure, FinishReason, Generation, Message, Problem, Sampling, TokenSequence, TopK
from drpo.types.calls import Call, MalformedCall, without_calls
from drpo.types.environment import StepResult, ToolSchema, Turn
from drpo.types.problem import message
from drpo.types.rollout import Played


class Conversation:
    """An episode that is being sampled; `episode` is its record once it is over.

    Args:
        number: of the episode among all that are sampled together.
        problem: that it is an attempt at.
        sample: which of the group's.
        sampling: the distribution that its turns are drawn from.
        messages: that the model read first.
        tools: schemas that the first prompt had.
        prompt: [P] int64; ids of that.
        shown: the same, decoded.
        in_environment: an environment answers; else there is one turn.
    """

    def __init__(
        self,
        number: int,
        problem: Problem,
        sample: int,
        sampling: Sampling,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        prompt: Tensor,
        shown: str,
        in_environment: bool,
    ) -> None:
        self.number, self.problem, self.sample = number, problem, sample
        self.failure: Failure | None = None
        self.goes_on = True
        self.finish_reason: FinishReason = "stop"
        self.tools = tools
        self._sampling, self._messages, self._shown = sampling, list(messages), shown
        self._prompt = prompt  # of the sequence that goes on
        self._pieces: list[Generation | Tensor] = []  # behind that prompt: turns, and glue between them
        self._ended: list[TokenSequence] = []  # sequences before a branch
        self._turns: list[Generation] = []
        self._text = ""
        self._native_calls: Sequence[Call | MalformedCall] = ()
        self._rewards: list[float] = []
        self._calls: list[int] = []
        self._failed_calls: list[int] = []
        self._done, self._in_environment = False, in_environment

    @property
    def context(self) -> Tensor:
        """[P] int64; what the model reads before its next turn."""
        return torch.cat([self._prompt, *map(_ids, self._pieces)])

    @property
    def last_turn(self) -> Generation | None:
        """The turn that the context continues; None before the first, and where it was rendered anew."""
        return next((piece for piece in reversed(self._pieces) if isinstance(piece, Generation)), None)

    @property
    def n_sampled(self) -> int:
        """Tokens that the model sampled so far."""
        return sum(len(g.token_ids) for g in self._turns)

    @property
    def turn(self) -> Turn:
        """The last turn, as an environment receives it."""
        return Turn(
            self._text, tuple(self._turns[-1].token_ids.tolist()), self.finish_reason, tuple(self._native_calls)
        )

    def speak(self, generation: Generation, text: str, native_calls: Sequence[Call | MalformedCall] = ()) -> None:
        """Add a turn of the model.

        Args:
            generation: its tokens.
            text: these decoded.
            native_calls: of tools, in the chat template's own form.
        """
        self._pieces.append(generation)
        self._turns.append(generation)
        self._messages.append(message("assistant", text))
        self._text, self._native_calls, self.finish_reason = text, native_calls, generation.finish_reason
        self._rewards.append(0.0)
        self._calls.append(0)
        self._failed_calls.append(0)

    def hear(self, result: StepResult, tokenizer: PreTrainedTokenizerBase, stop: frozenset[int], *, last: bool) -> None:
        """Add what the environment answers: by the template's glue, or by a branch where it has none.

        Args:
            result: of the last turn.
            tokenizer: with the model's chat template.
            stop: ids of the tokens that end a turn.
            last: there will be no further turn.
        """
        self._rewards[-1] = result.reward
        self._calls[-1], self._failed_calls[-1] = len(result.calls), result.failed_calls
        self._done, self.goes_on = result.done, not (result.done or last)
        self._messages[-1:] = [{**self._messages[-1], **({"tool_calls": list(result.calls)} if result.calls else {})}]
        self._messages += result.messages
        if not self.goes_on:
            return
        between = glue(
            tokenizer,
            result.messages,
            last=int(self._turns[-1].token_ids[-1]),
            stop=stop,
            tools=self.tools,
            calls=result.calls,
        )
        if between is None:
            self._branch(tokenizer)
        else:
            self._pieces.append(between)

    def _branch(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go on in a further sequence, whose prompt is the whole conversation, rendered anew; or fail.

        Where that begins with all that was read and said so far, token by token, it is no further sequence.
        """
        try:
            ids = encode_messages(tokenizer, [_called_once(m) for m in self._messages], self.tools)
        except Exception as error:  # a template is a program, which may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            self.fail(Failure("raised", f"the model's chat template refuses the conversation: {reason}"))
            return
        prompt, so_far = torch.tensor(ids, dtype=torch.int64), self.context
        if len(prompt) > len(so_far) and torch.equal(prompt[: len(so_far)], so_far):
            self._pieces.append(prompt[len(so_far) :])
            return
        if any(map(_is_turn, self._pieces)):
            self._ended.append(_sequence(self._prompt, self._pieces))
        self._prompt, self._pieces = prompt, []

    def fail(self, failure: Failure) -> None:
        """End the episode: its environment failed."""
        self.failure, self.goes_on = failure, False

    def episode(self) -> Episode:
        """Return the record of the episode."""
        of_turns = (tuple(self._calls), tuple(self._failed_calls))
        played = Played(tuple(self._rewards), self._done, *of_turns, self.failure)
        open_sequence = [_sequence(self._prompt, self._pieces)] if any(map(_is_turn, self._pieces)) else []
        return Episode(
            problem_id=self.problem.id,
            sample=self.sample,
            messages=tuple(self._messages),
            prompt=self._shown,
            text=self._text,
            finish_reason=self.finish_reason,
            sampling=self._sampling,
            turns=tuple(len(g.token_ids) for g in self._turns),
            sequences=(*self._ended, *open_sequence),
            played=played if self._in_environment else None,
        )


def _called_once(said: Message) -> Message:
    """A message whose calls the template writes: they are no part of its text."""
    return {**said, "content": without_calls(said["content"])} if said.get("tool_calls") else said


def _ids(piece: Generation | Tensor) -> Tensor:
    return piece.token_ids if isinstance(piece, Generation) else piece


def _is_turn(piece: Generation | Tensor) -> bool:
    return isinstance(piece, Generation)


def _sequence(prompt: Tensor, pieces: Sequence[Generation | Tensor]) -> TokenSequence:
    """The record of a prompt and what followed it; what was replied after the last turn is left out."""
    last = max(i for i, piece in enumerate(pieces) if _is_turn(piece))
    pieces = pieces[: last + 1]
    turns = [piece for piece in pieces if isinstance(piece, Generation)]
    tops = [g.top_logprobs for g in turns if g.top_logprobs is not None]
    return TokenSequence(
        prompt_ids=prompt,
        token_ids=torch.cat([_ids(piece) for piece in pieces]),
        sampled=torch.cat([torch.full((len(_ids(piece)),), _is_turn(piece)) for piece in pieces]),
        behavior_logp=torch.cat([g.behavior_logp for g in turns]),
        version=torch.cat([torch.full_like(g.token_ids, g.version) for g in turns]),
        top_logprobs=TopK.cat(tops) if tops else None,
        routes=joined(len(prompt), pieces),
    )
