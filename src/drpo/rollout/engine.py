"""What an engine is: it samples rows of token ids, and knows no problems, templates, texts or tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.errors import BrokenLogpError
from drpo.types import FinishReason, Generation, Request, TopK


class Engine(Protocol):
    """Samples with its own copy of the weights."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return what was sampled for each request, in order.

        The random numbers of a row are a function of `Request.key` alone. Rows of equal prompts that stand side by side
        may share the work on the prompt. Each generation carries `top_logprobs` where its request asks for them.
        """
        ...

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Take new weights, by parameter name; later generations carry `version`."""
        ...

    def close(self) -> None:
        """Release what the engine holds besides memory; it is not used afterwards."""
        ...


class NoEngine:
    """In place of an engine, on a rank that leaves sampling to others."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Nothing is asked of it."""
        return []

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def generation(
    request: Request,
    token_ids: Tensor,
    behavior_logp: Tensor,
    finish_reason: FinishReason,
    version: int,
    top_logprobs: TopK | None = None,
) -> Generation:
    """Return the generation of a request; arguments as of `Generation`.

    Raises:
        BrokenLogpError: as `Generation`, or other top log-probabilities than were asked for; it names the request.
    """
    try:
        if top_logprobs is not None:
            top_logprobs.require(len(token_ids), request.sampling.top_logprobs)
        return Generation(token_ids, behavior_logp, finish_reason, version, top_logprobs)
    except BrokenLogpError as error:
        raise BrokenLogpError(f"{request.name}: {error}") from None


@dataclass
class ScriptedEngine:
    """An engine for tests: it "samples" the texts of a script, every token at the same log-probability.

    All other tokens share what the scripted one leaves, so that `top_logprobs` is a distribution too.

    Args:
        tokenizer: encodes the scripted texts.
        script: request -> text.
        logp: log-probability reported for every token, nats.
        loaded: versions that `load_weights` received, in order.
    """

    tokenizer: PreTrainedTokenizerBase
    script: Callable[[Request], str]
    logp: float = -0.5
    version: int = 0
    loaded: list[int] = field(default_factory=list)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return what the script says, cut at `max_new_tokens`, with an EOS where it fits."""
        return [self._generation(request) for request in requests]

    def _generation(self, request: Request) -> Generation:
        most, k = request.sampling.max_new_tokens, request.sampling.top_logprobs
        ids = [
            *self.tokenizer(self.script(request), add_special_tokens=False)["input_ids"],
            self.tokenizer.eos_token_id,
        ]
        token_ids = torch.tensor(ids[:most], dtype=torch.int64)
        top = self._top(token_ids, k) if k else None
        finish_reason: FinishReason = "stop" if len(ids) <= most else "length"
        logp = torch.full(token_ids.shape, self.logp)
        return generation(request, token_ids, logp, finish_reason, self.version, top)

    def _top(self, token_ids: Tensor, k: int) -> TopK:
        """The scripted token, then the first k - 1 others."""
        others = torch.arange(k - 1).expand(len(token_ids), -1)
        ids = torch.cat([token_ids[:, None], others + (others >= token_ids[:, None])], 1)
        left = -torch.tensor(self.logp).expm1()
        logp = (left / (len(self.tokenizer) - 1)).log().repeat(ids.shape)
        logp[:, 0] = self.logp
        return TopK(ids, logp)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Note the version; there are no weights to take."""
        self.version = version
        self.loaded.append(version)

    def close(self) -> None:
        """Nothing is held."""
