"""Requests to vLLM and generations from its outputs, shared by the engine in process and the server engine."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from drpo.errors import InputError
from drpo.rollout.engine import generation
from drpo.seeds import derive
from drpo.types import Generation, Request, Routes, TopK
from drpo.types.routes import compact, none_chosen

Pairs = Sequence[tuple[int, float]]
"""Token ids with their log-probabilities, nats."""


COOLEST, HOTTEST = 0.01, 2.0
"""vLLM samples at 0.01 where a lower temperature than that is asked for, and fails above 2."""


def require_known(requests: Sequence[Request], vocabulary: int) -> None:
    """Raise if vLLM would sample from another distribution than a request asks for, or not at all.

    Raises:
        InputError: a temperature that vLLM does not have, or more top log-probabilities than the vocabulary has tokens.
    """
    for sampling in {request.sampling for request in requests}:
        t = sampling.temperature
        if t and not COOLEST <= t <= HOTTEST:
            raise InputError(
                f"sampling.temperature={t:g}: vLLM samples at 0 and at {COOLEST} to {HOTTEST:g}; set one of these, or "
                "--engine transformers"
            )
        if sampling.top_logprobs > vocabulary:
            raise InputError(
                f"sampling.top_logprobs={sampling.top_logprobs}: the model has {vocabulary} tokens; ask for fewer"
            )


def read_generation(
    request: Request,
    *,
    token_ids: Sequence[int],
    logp: Sequence[float] | None,
    finish_reason: str | None,
    top: Sequence[Pairs] = (),
    vocabulary: int,
    version: int,
    chosen: np.ndarray | None = None,
    experts: Mapping[int, int] | None = None,
) -> Generation:
    """Return the generation of vLLM's output for a request.

    Args:
        request: the request.
        token_ids: N token ids, including the stop token.
        logp: N log-probabilities, nats; None if missing.
        finish_reason: vLLM's: "stop", "length", or the name of a failure.
        top: for each of the N positions at least `sampling.top_logprobs` pairs, in any order.
        vocabulary: the vocabulary's size.
        version: the weights' version.
        chosen: vLLM's `routed_experts`; read only with `experts`.
        experts: the number of experts of each layer that has any; None for a generation without routes.

    Raises:
        InputError: vLLM aborted the request, its tokens are impossible, its log-probabilities are missing or broken, or
            what its routers chose is.
    """
    if finish_reason not in ("stop", "length"):
        raise InputError(
            f"{request.name}: vLLM ended it for {str(finish_reason)[:40]!r}, not at a stop token or at the length limit"
        )
    _require_possible(request, token_ids, top, vocabulary)
    k = request.sampling.top_logprobs
    if k and logp is not None and (len(top) != len(token_ids) or min(map(len, top), default=k) < k):
        raise InputError(f"{request.name}: vLLM sent fewer top log-probabilities than the {k} of each token asked for")
    return generation(
        request,
        torch.tensor(token_ids, dtype=torch.int64),
        None if logp is None else torch.tensor(logp),  # type: ignore[arg-type]
        "stop" if finish_reason == "stop" else "length",
        version,
        _top(top, k) if k else None,
        None if experts is None else _routes(request, chosen, len(token_ids), experts),
    )


def _routes(request: Request, chosen: np.ndarray | None, n: int, experts: Mapping[int, int]) -> Routes:
    """Return the routes of a prompt and of the n tokens sampled after it.

    Args:
        request: the request.
        chosen: [P + n - 1, decoder layers, k] integers, zeros in layers without experts; nothing read the last token.
        n: sampled tokens.
        experts: layer -> number of experts.

    Raises:
        InputError: they are missing, of another shape, or name experts that the model does not have.
    """
    if chosen is None:
        raise InputError(
            f"{request.name}: vLLM reported no routed_experts, which routing_replay=sampler requires; start a server "
            "with `drpo serve-rollouts MODEL -- --enable-return-routed-experts`, or set --routing-replay off"
        )
    read, layers, largest = len(request.prompt_ids) + n - 1, list(experts), max(experts.values())
    if chosen.ndim != 3 or len(chosen) != read or chosen.shape[1] <= layers[-1] or chosen.dtype.kind not in "iu":
        raise InputError(
            f"{request.name}: vLLM sent routed_experts of {list(chosen.shape)} {chosen.dtype}; it must have integers "
            f"for each of the {read} tokens that it read and for each of the model's layers; set --routing-replay off"
        )
    table = chosen[:, layers].astype(np.int64)
    if table.size and not 0 <= table.min() <= table.max() < largest:
        raise InputError(
            f"{request.name}: vLLM sent experts {table.min()} to {table.max()} of a model that has {largest}; set "
            "--routing-replay off"
        )
    compacted = torch.from_numpy(table).to(compact(largest))
    prompt, tokens = compacted[: len(request.prompt_ids)], compacted[len(request.prompt_ids) :]
    return Routes(prompt.clone(), torch.cat([tokens, none_chosen(1, tokens)]))


def _require_possible(request: Request, token_ids: Sequence[int], top: Sequence[Pairs], vocabulary: int) -> None:
    """Raise for more tokens than requested, or for ids outside the vocabulary.

    Raises:
        InputError: there are such tokens.
    """
    most = request.sampling.max_new_tokens
    listed = [token for pairs in top for token, _ in pairs]
    odd = next((i for i in (*token_ids, *listed) if type(i) is not int or not 0 <= i < vocabulary), None)
    if len(token_ids) > most or odd is not None:
        what = (
            f"{len(token_ids)} tokens of at most {most}" if len(token_ids) > most else f"{str(odd)[:40]!r} as a token"
        )
        raise InputError(f"{request.name}: vLLM sent {what}")


def parameters(request: Request) -> dict[str, Any]:
    """Return all parameters of vLLM's SamplingParams that affect what is sampled or when it ends.

    Values equal to vLLM's defaults are sent too: a server takes missing ones from the model's generation_config.json.
    `ignore_eos` leaves `stop_token_ids` as the only list of stop tokens.

    Example:
        >>> from drpo.types import Sampling
        >>> sent = parameters(Request(torch.tensor([1]), Sampling(temperature=0.6), frozenset({2}), key=(0, "a", 1)))
        >>> sent["temperature"], sent["top_k"], sent["stop_token_ids"], sent["n"]
        (0.6, 0, [2], 1)
    """
    sampling = request.sampling
    return {
        "n": 1,
        "seed": derive(*request.key),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": None,
        "structured_outputs": None,
        "stop": None,
        "stop_token_ids": sorted(request.stop),
        "ignore_eos": True,
        "min_tokens": 0,
        "max_tokens": sampling.max_new_tokens,
        "logprobs": sampling.top_logprobs,
        "prompt_logprobs": None,
        "detokenize": False,
    }


def _top(positions: Sequence[Pairs], k: int) -> TopK:
    """Return the k most probable tokens of each position; vLLM adds the sampled token first if it is not among them."""
    chosen = [sorted(pairs, key=lambda pair: -pair[1])[:k] for pairs in positions]
    ids = torch.tensor([[token for token, _ in pairs] for pairs in chosen], dtype=torch.int64)
    return TopK(ids, torch.tensor([[logp for _, logp in pairs] for pairs in chosen]))
