"""Requests of OpenAI's API: JSON -> `CompletionRequest`, or an error of the API.

Unsupported fields that would change the answer (penalties, tools, formats of the answer) are refused, not ignored.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from drpo.errors import InputError, one_line
from drpo.rollout.prompts import encode_prompt, encode_text
from drpo.serving.sampler import Sampler
from drpo.tasks.conversations import ROLES
from drpo.types import Message, Problem, Sampling

MOST_TOKENS = 2**20
"""Upper bound of an answer, where the model has none."""
MOST_CHOICES = 64
"""Upper bound of the answers to one request: prompts times `n`."""
MOST_STOPS, MOST_TOP = 4, 20
"""As OpenAI has it: texts in `stop`, and `top_logprobs`."""


class ApiError(Exception):
    """An error as OpenAI's API reports it.

    Args:
        message: for people.
        status: of HTTP.
        param: the field of the request that it is about.
        code: for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options` of a request."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both kinds of requests. Fields of type Any change no answer."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class ChatBody(_Body, kw_only=True):
    """The body of a request to /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None


class TextBody(_Body, kw_only=True):
    """The body of a request to /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


@dataclass(frozen=True, eq=False)
class CompletionRequest:
    """A parsed request.

    Args:
        kind: of the request: chat, or text for /v1/completions.
        model: as the request names it.
        prompts: [P] int64 each; one for a chat.
        n: answers to each.
        sampling: of each prompt, in order; they differ in `max_new_tokens`, which the model's limit may reduce.
        seed: of the random numbers; drawn where the request has none.
        stop: texts before which an answer ends.
        logprobs: whether the answer has log-probabilities.
        stream: answer piece by piece.
        include_usage: end a stream with the number of tokens.
    """

    kind: Literal["chat", "text"]
    model: str
    prompts: tuple[Tensor, ...]
    n: int
    sampling: tuple[Sampling, ...]
    seed: int
    stop: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool


def read_chat(data: bytes, sampler: Sampler, longest: int) -> CompletionRequest:
    """Return the parsed request to /v1/chat/completions.

    Args:
        data: its body.
        sampler: will answer.
        longest: default limit of an answer, in tokens.

    Raises:
        ApiError: it is not such a request, or asks for something unsupported.
    """
    body = _decoded(data, ChatBody)
    _require_plain(body)
    _refuse("tools", body.tools, "tools are not supported: nothing here would call them")
    _refuse("tool_choice", None if body.tool_choice in ("none", "auto") else body.tool_choice, "there are no tools")
    plain = (body.response_format or {}).get("type", "text") == "text"
    _refuse("response_format", None if plain else body.response_format, "answers are text; leave it out")
    top = body.top_logprobs or 0
    if top and not body.logprobs:
        raise ApiError("top_logprobs requires logprobs=true", param="top_logprobs")
    problem = Problem("messages", tuple(map(_message, body.messages)) or _none("messages"), "")
    try:
        prompt = encode_prompt(sampler.tokenizer, problem)
    except InputError as error:
        raise ApiError(str(error).removeprefix("problem 'messages': "), param="messages") from None
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    is_exact, limit = limit is not None, longest if limit is None else limit
    return _request("chat", body, (prompt,), sampler, limit, is_exact, bool(body.logprobs), top)


def read_text(data: bytes, sampler: Sampler, longest: int) -> CompletionRequest:
    """Return the parsed request to /v1/completions; arguments and errors as for `read_chat`."""
    body = _decoded(data, TextBody)
    _require_plain(body)
    _refuse("suffix", body.suffix, "is not supported")
    _refuse("echo", body.echo, "is not supported: the prompt's own log-probabilities are not computed")
    if body.best_of not in (None, body.n or 1):
        raise ApiError("best_of: no answer is left out here; set n", param="best_of")
    prompts = tuple(_prompt(prompt, sampler) for prompt in _prompts(body.prompt))
    limit = 16 if body.max_tokens is None else body.max_tokens  # as OpenAI's
    return _request("text", body, prompts, sampler, limit, True, body.logprobs is not None, body.logprobs or 0)


def _request(
    kind: Literal["chat", "text"],
    body: _Body,
    prompts: tuple[Tensor, ...],
    sampler: Sampler,
    limit: int,
    is_exact: bool,
    logprobs: bool,
    top: int,
) -> CompletionRequest:
    n = 1 if body.n is None else body.n
    if not 1 <= n * len(prompts) <= MOST_CHOICES:
        raise ApiError(f"n={n}: a request has from 1 to {MOST_CHOICES} answers, over all of its prompts", param="n")
    if not 0 <= top <= MOST_TOP:
        name = "top_logprobs" if kind == "chat" else "logprobs"
        raise ApiError(f"{name}={top}: must be from 0 to {MOST_TOP}", param=name)
    return CompletionRequest(
        kind,
        body.model,
        prompts,
        n,
        tuple(_sampling(body, prompt, sampler, limit, is_exact, top) for prompt in prompts),
        secrets.randbelow(2**63) if body.seed is None else body.seed,
        _stops(body.stop),
        logprobs,
        bool(body.stream),
        body.stream_options is not None and body.stream_options.include_usage,
    )


def _sampling(body: _Body, prompt: Tensor, sampler: Sampler, limit: int, is_exact: bool, top: int) -> Sampling:
    """Return the sampling of a prompt's answers; the request's own limit must fit after the prompt."""
    try:
        room = sampler.room(prompt)
    except InputError as error:
        raise ApiError(str(error), code="context_length_exceeded") from None
    room = MOST_TOKENS if room is None else room
    if is_exact and limit > room:
        raise ApiError(
            f"max_tokens={limit}: the prompt has {len(prompt):,} tokens, after which there is room for {room:,}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    given = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    known = {name: value for name, value in given.items() if value is not None}
    try:
        return Sampling(samples=1, max_new_tokens=min(limit, room), top_logprobs=top, **known)  # type: ignore[arg-type]
    except InputError as error:
        name = re.match(r"sampling\.(\w+)", str(error))
        param = None if name is None else name[1].replace("max_new_tokens", "max_tokens")
        raise ApiError(str(error).removeprefix("sampling."), param=param) from None


def _decoded(data: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:  # Object contains unknown field `x` - at `$.y`
        text = one_line(error).replace("`", "'")
        named = re.search(r"field '([^']*)'", text) or re.search(r"\$\.(\w+)", text)
        raise ApiError(text, param=named and named[1]) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(f"the body is not JSON that can be read: {one_line(error)}") from None


def _require_plain(body: _Body) -> None:
    """Raise for fields that would change the distribution and that the sampler does not support."""
    for name in ("presence_penalty", "frequency_penalty"):
        _refuse(name, getattr(body, name) or None, "is not supported; leave it out, or set 0")
    _refuse("logit_bias", body.logit_bias or None, "is not supported; leave it out")


def _refuse(name: str, value: object, why: str) -> None:
    if value:
        raise ApiError(f"{name}: {why}", param=name, code="unsupported_parameter")


def _none(name: str) -> Any:
    raise ApiError(f"{name}: there are none", param=name)


def _message(record: Mapping[str, Any]) -> Message:
    role, content = record.get("role"), record.get("content")
    if role not in ROLES:
        raise ApiError(f"messages: role={one_line(role)!r}: must be one of {', '.join(ROLES)}", param="messages")
    if record.get("tool_calls"):
        raise ApiError("messages: tool_calls are not supported", param="messages", code="unsupported_parameter")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError("messages: content must be a text, or parts of the type text", param="messages")
    return {**record, "content": "".join(map(str, texts))}


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """The prompts of a request: a text, token ids, or a list of either."""
    alone = isinstance(prompt, str) or all(isinstance(item, int) for item in prompt)
    return [prompt] if alone and prompt != [] else list(prompt) or _none("prompt")


def _prompt(prompt: Any, sampler: Sampler) -> Tensor:
    if isinstance(prompt, str):
        try:
            return encode_text(sampler.tokenizer, prompt)
        except InputError as error:
            raise ApiError(f"prompt: {error}", param="prompt") from None
    is_ids = isinstance(prompt, list) and prompt and all(type(i) is int and 0 <= i < 2**31 for i in prompt)
    if not is_ids:
        raise ApiError("prompt: must be a text, a list of token ids, or a list of these", param="prompt")
    return torch.tensor(prompt, dtype=torch.int64)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MOST_STOPS or not all(stops):
        raise ApiError(f"stop: must be at most {MOST_STOPS} texts, none of them empty", param="stop")
    return stops
