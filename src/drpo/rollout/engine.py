"""The engine protocol: engines sample rows of token ids, without problems, templates, texts or tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from drpo.errors import BrokenLogpError
from drpo.types import FinishReason, Generation, Request, Routes, TopK


class Engine(Protocol):
    """Samples with its own copy of the weights."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return one generation per request, in order.

        A row's random numbers depend on `Request.key` alone. Adjacent rows of equal prompts may share the work on the
        prompt. Each generation has `top_logprobs` if its request asks for them.
        """
        ...

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Load new weights, by parameter name; later generations have this `version`."""
        ...

    def release(self) -> None:
        """Free what was kept for requests that continue earlier ones: no episode goes on."""
        ...

    def close(self) -> None:
        """Release processes and files; the engine is not used afterwards."""
        ...


class NoEngine:
    """The engine of a rank that does not sample."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return nothing; there are no requests."""
        return []

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def generation(
    request: Request,
    token_ids: Tensor,
    behavior_logp: Tensor,
    finish_reason: FinishReason,
    version: int,
    top_logprobs: TopK | None = None,
    routes: Routes | None = None,
) -> Generation:
    """Return the generation of a request; arguments as for `Generation`.

    Raises:
        BrokenLogpError: as `Generation`, or other top log-probabilities than requested; names the request.
    """
    try:
        if top_logprobs is not None:
            top_logprobs.require(len(token_ids), request.sampling.top_logprobs)
        return Generation(token_ids, behavior_logp, finish_reason, version, top_logprobs, routes)
    except BrokenLogpError as error:
        raise BrokenLogpError(f"{request.name}: {error}") from None


@dataclass
class ScriptedEngine:
    """An engine for tests that returns scripted texts, each token with the same log-probability.

    All other tokens share the remaining probability, so that `top_logprobs` is a distribution too.

    Args:
        tokenizer: encodes the scripted texts.
        script: request -> text.
        logp: log-probability reported for every token, nats.
        loaded: the versions passed to `load_weights`, in order.
    """

    tokenizer: PreTrainedTokenizerBase
    script: Callable[[Request], str]
    logp: float = -0.5
    version: int = 0
    loaded: list[int] = field(default_factory=list)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return the scripted texts, cut at `max_new_tokens`, with an EOS if it fits."""
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
        """Return the scripted token, then the first k - 1 others."""
        others = torch.arange(k - 1).expand(len(token_ids), -1)
        ids = torch.cat([token_ids[:, None], others + (others >= token_ids[:, None])], 1)
        left = -torch.tensor(self.logp).expm1()
        logp = (left / (len(self.tokenizer) - 1)).log().repeat(ids.shape)
        logp[:, 0] = self.logp
        return TopK(ids, logp)

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Record the version; there are no weights."""
        self.version = version
        self.loaded.append(version)

    def release(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
