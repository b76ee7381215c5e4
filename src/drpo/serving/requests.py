"""Requests of OpenAI's API: JSON -> `CompletionRequest`, or an error of the API.

Unsupported fields that would change the answer (penalties, tools, formats of the answer) are refused, not ignored.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

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
MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id")
"""Of a message: texts, which the chat template receives."""
_ONE_TOKEN = Sampling(samples=1, max_new_tokens=1)


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


class _Limit(NamedTuple):
    """Of an answer.

    Args:
        name: of the request's field.
        tokens: at most.
        is_exact: the request has the field, so that many must fit after the prompt.
    """

    name: str
    tokens: int
    is_exact: bool


def read_chat(data: bytes, sampler: Sampler, longest: int, model: str) -> CompletionRequest:
    """Return the parsed request to /v1/chat/completions; it is tokenised once all else about it is right.

    Args:
        data: its body.
        sampler: will answer.
        longest: default limit of an answer, in tokens.
        model: the name of the one there is.

    Raises:
        ApiError: it is not such a request, names another model, or asks for something unsupported.
    """
    body = _decoded(data, ChatBody, model)
    _require_plain(body)
    _refuse("tools", body.tools, "tools are not supported: nothing here would call them")
    _refuse("tool_choice", None if body.tool_choice in ("none", "auto") else body.tool_choice, "there are no tools")
    is_text = body.response_format == {"type": "text"}
    _refuse("response_format", None if is_text else body.response_format, "answers are text; leave it out")
    top = body.top_logprobs or 0
    if top and not body.logprobs:
        raise ApiError("top_logprobs requires logprobs=true", param="top_logprobs")
    problem = Problem("messages", tuple(map(_message, body.messages)) or _none("messages"), "")
    prompt = partial(_chat_prompt, problem, sampler)
    return _request("chat", body, [prompt], sampler, _limit(body, longest), bool(body.logprobs), top)


def read_text(data: bytes, sampler: Sampler, longest: int, model: str) -> CompletionRequest:
    """Return the parsed request to /v1/completions; arguments and errors as for `read_chat`."""
    body = _decoded(data, TextBody, model)
    _require_plain(body)
    _refuse("suffix", body.suffix, "is not supported")
    _refuse("echo", body.echo, "is not supported: the prompt's own log-probabilities are not computed")
    if body.best_of not in (None, body.n or 1):
        raise ApiError("best_of: no answer is left out here; set n", param="best_of")
    prompts = [partial(_text_prompt, prompt, sampler) for prompt in _prompts(body.prompt)]
    limit = _limit(body, 16)  # as OpenAI's
    return _request("text", body, prompts, sampler, limit, body.logprobs is not None, body.logprobs or 0)


def no_model(name: str, known: str) -> ApiError:
    """Return the error for an unknown model.

    Args:
        name: of the request.
        known: the name of the one there is.
    """
    return ApiError(f"model {name!r} is not here; there is {known!r}", 404, "model", "model_not_found")


def _request(
    kind: Literal["chat", "text"],
    body: _Body,
    prompts: Sequence[Callable[[], Tensor]],
    sampler: Sampler,
    limit: _Limit,
    logprobs: bool,
    top: int,
) -> CompletionRequest:
    n = 1 if body.n is None else body.n
    if not 1 <= n * len(prompts) <= MOST_CHOICES:
        name, count = ("prompt", f"{len(prompts):,} of them with n={n}") if 1 <= n <= MOST_CHOICES else ("n", str(n))
        raise ApiError(f"{name}: {count}: a request has from 1 to {MOST_CHOICES} answers in all", param=name)
    if not 0 <= top <= MOST_TOP:
        name = "top_logprobs" if kind == "chat" else "logprobs"
        raise ApiError(f"{name}={top}: must be from 0 to {MOST_TOP}", param=name)
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options requires stream=true", param="stream_options")
    sampling, stop = _sampling(body, limit, top), _stops(body.stop)
    field = "messages" if kind == "chat" else "prompt"
    encoded = tuple(encode() for encode in prompts)
    return CompletionRequest(
        kind,
        body.model,
        encoded,
        n,
        tuple(replace(sampling, max_new_tokens=_fitting(limit, prompt, sampler, field)) for prompt in encoded),
        secrets.randbelow(2**63) if body.seed is None else body.seed,
        stop,
        logprobs,
        bool(body.stream),
        body.stream_options is not None and body.stream_options.include_usage,
    )


def _limit(body: _Body, default: int) -> _Limit:
    """Return the limit of an answer: the request's own, by the old name or the new, or the default."""
    names = ("max_completion_tokens", "max_tokens")
    given = {name: value for name in names if (value := getattr(body, name, None)) is not None}
    if len(set(given.values())) > 1:
        both = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ApiError(f"{both}: these are two names of one limit; send one", param="max_tokens")
    name, tokens = next(iter(given.items()), ("max_tokens", default))
    return _Limit(name, tokens, bool(given))


def _fitting(limit: _Limit, prompt: Tensor, sampler: Sampler, field: str) -> int:
    """Return how long the answers to a prompt may be; the request's own limit must fit after the prompt."""
    try:
        sampler.require_embedded(prompt)
    except InputError as error:
        raise ApiError(f"{field}: {error}", param=field) from None
    try:
        room = sampler.room(prompt)
    except InputError as error:
        raise ApiError(str(error), param=field, code="context_length_exceeded") from None
    room = MOST_TOKENS if room is None else room
    if limit.is_exact and limit.tokens > room:
        raise ApiError(
            f"{limit.name}={limit.tokens}: there is room for {room:,} after the {len(prompt):,} tokens of the prompt",
            param=limit.name,
            code="context_length_exceeded",
        )
    return min(limit.tokens, room)


def _sampling(body: _Body, limit: _Limit, top: int) -> Sampling:
    """Return the sampling of the answers, not yet fitted to the model's limit."""
    given = {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    known = {name: value for name, value in given.items() if value is not None}
    try:
        return Sampling(samples=1, max_new_tokens=limit.tokens, top_logprobs=top, **known)  # type: ignore[arg-type]
    except InputError as error:
        message = str(error).removeprefix("sampling.").replace("max_new_tokens", limit.name)
        raise ApiError(message, param=message.partition("=")[0]) from None


def _decoded(data: bytes, kind: type[Any], model: str) -> Any:
    try:
        body = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:  # Object contains unknown field `x` - at `$.y`
        text = one_line(error).replace("`", "'")
        named = re.search(r"field '([^']*)'", text) or re.search(r"\$\.(\w+)", text)
        raise ApiError(text, param=named and named[1]) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(f"the body is not JSON that can be read: {one_line(error)}") from None
    if body.model != model:
        raise no_model(body.model, model)
    return body


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
    for name, value in record.items():
        if name not in MESSAGE_FIELDS and value not in (None, [], {}):  # clients return the nulls of an answer
            why = f"messages: the field {one_line(name)!r} of a message is not supported"
            raise ApiError(why, param="messages", code="unsupported_parameter")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p["text"] if isinstance(p, dict) and p == {"type": "text", "text": p.get("text")} else None for p in parts]
    others = {name: record[name] for name in MESSAGE_FIELDS if name != "content" and record.get(name) is not None}
    if not all(isinstance(text, str) for text in (*texts, *others.values())):
        raise ApiError("messages: content, name and tool_call_id are texts, content also in parts", param="messages")
    return {**others, "content": "".join(map(str, texts))}


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """The prompts of a request: a text, token ids, or a list of either."""
    alone = isinstance(prompt, str) or all(isinstance(item, int) for item in prompt)
    return [prompt] if alone and prompt != [] else list(prompt) or _none("prompt")


def _chat_prompt(problem: Problem, sampler: Sampler) -> Tensor:
    _require_short(problem, sampler, "messages")
    try:
        return encode_prompt(sampler.tokenizer, problem)
    except InputError as error:
        raise ApiError(str(error).removeprefix(f"problem {problem.id!r}: "), param="messages") from None


def _require_short(prompt: Problem | str, sampler: Sampler, field: str) -> None:
    """Raise for a prompt that cannot fit, by its bytes."""
    if least := sampler.limits.least_too_long(sampler.tokenizer, prompt, _ONE_TOKEN):
        error = sampler.too_long(f"{least:,} tokens or more")
        raise ApiError(str(error), param=field, code="context_length_exceeded")


def _text_prompt(prompt: Any, sampler: Sampler) -> Tensor:
    if isinstance(prompt, str):
        _require_short(prompt, sampler, "prompt")
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
