"""Answers of a model, token by token, from the sampler of rollouts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drpo.errors import InputError
from drpo.model.precision import resolve_precision
from drpo.rollout import PromptLimits, TransformersEngine
from drpo.rollout.turn_ends import stop_ids
from drpo.serving.text import Piece, TextStream
from drpo.types import Key, Request, Sampling


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model, and all its answers require.

    Args:
        engine: samples.
        tokenizer: the model's, with its chat template.
        stop: ids of the tokens that end a turn.
        limits: of the model's context.
    """

    engine: TransformersEngine
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    limits: PromptLimits

    @staticmethod
    def of(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        precision: str = "auto",
        device: torch.device | None = None,
    ) -> "Sampler":
        """Return the sampler of a copy of a model.

        Args:
            model: to copy.
            tokenizer: the model's.
            stop: as for `drpo.rollout.turn_ends.stop_ids`.
            precision: of the copy, by name.
            device: of the copy; None for the model's.

        Raises:
            InputError: an unknown stop token or precision.
        """
        device = device or model.device
        engine = TransformersEngine(model, precision=resolve_precision(precision, device), device=device)
        return Sampler(engine, tokenizer, stop_ids(model, tokenizer, stop), PromptLimits.of(model))

    def require_embedded(self, prompt_ids: Tensor) -> None:
        """Raise for a token id that the model has no embedding of.

        Raises:
            InputError: there is one.
        """
        if (highest := int(prompt_ids.max())) >= self.limits.embeddings:
            raise InputError(f"token id {highest}: the model has embeddings for ids below {self.limits.embeddings}")

    def room(self, prompt_ids: Tensor) -> int | None:
        """Return how many tokens fit after a prompt; None without a limit.

        Raises:
            InputError: none fits, or the model has no embedding of an id.
        """
        self.require_embedded(prompt_ids)
        if self.limits.positions is None:
            return None
        if (room := self.limits.positions - len(prompt_ids)) < 1:
            raise self.too_long(f"{len(prompt_ids):,} tokens")
        return room

    def too_long(self, length: str) -> InputError:
        """Return the error of a prompt after which no token fits.

        Args:
            length: of the prompt, in words.
        """
        limits = self.limits
        return InputError(
            f"the prompt has {length}, and the model {limits.positions:,} positions{limits.why}; shorten it"
        )

    def stream(self, prompt_ids: Tensor, sampling: Sampling, key: Key, stop: Sequence[str] = ()) -> Iterator[Piece]:
        """Yield an answer, a piece for each token and a last one with the finish reason.

        Sampled alone, so that an answer depends on prompt, sampling and key, not on other requests.

        Args:
            prompt_ids: [P] int64.
            sampling: the distribution to sample from.
            key: of the random numbers.
            stop: texts before which the answer ends.

        Raises:
            BrokenLogpError: the model's logits are not finite.
        """
        stream, last = TextStream(self.tokenizer, stop), None
        for last in self.engine.stream(Request(prompt_ids, sampling, self.stop, key, "the answer")):
            piece = stream.add(last)
            yield piece
            if piece.finish_reason is not None:
                return
        yield stream.end("stop" if last is not None and last.id in self.stop else "length")
