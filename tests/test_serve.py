"""The server that speaks OpenAI's API: what it answers, to whom, and that requests do not disturb one another.

A real server on loopback is asked with httpx2, and with OpenAI's own client where that is installed.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import torch

from drpo.cli import serve
from drpo.cli.commands.serve import ServeOptions
from drpo.cli.serve import made_server
from drpo.credentials import TOKEN
from drpo.errors import InputError
from drpo.rollout import encode_prompt
from drpo.rollout import server as rollout_server
from drpo.rollout.gate import CALLS
from drpo.rollout.prompts import encode_text
from drpo.rollout.stream import SampledToken
from drpo.serving import http, requests
from drpo.serving.fair_lock import FairLock
from drpo.serving.http import Server, Service
from drpo.serving.responses import token_bytes
from drpo.serving.sampler import Sampler
from drpo.types import Problem, Sampling
from support.base_model import TEMPLATE
from support.hostile import refused
from support.tiny_world import STOPS, tiny

KEY = "a key of forty letters, which is a secret"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def sampler_of(template: str | None = TEMPLATE) -> Sampler:
    model, tokenizer = tiny(STOPS)
    tokenizer.chat_template = template
    return Sampler.of(model, tokenizer, precision="fp32")


@contextmanager
def served(service: Service) -> Iterator[httpx2.Client]:
    """A server in a thread, and a client that has its key."""
    server = Server(("127.0.0.1", 0))
    server.open(replace(service, lock=FairLock()))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with httpx2.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
            yield client
    finally:
        server.shutdown()
        assert server.close()
        thread.join()


@pytest.fixture(scope="module")
def service() -> Service:
    return Service(sampler_of(), "tiny", KEY, longest=24)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx2.Client]:
    with served(service) as client:
        yield client


def ask(client: httpx2.Client, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "seed": 1} | ({"messages": HELLO} if path == CHAT else {"prompt": "hello"}) | fields
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def chunks(client: httpx2.Client, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "seed": 1, "stream": True}
    body |= ({"messages": HELLO} if path == CHAT else {"prompt": "hello"}) | fields
    with client.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def texts(answer: Mapping[str, Any]) -> list[str]:
    return [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]


# Answers


def test_a_chat_is_answered_by_the_model(client: httpx2.Client, service: Service):
    """The text is the sampler's, of the prompt that the chat template makes."""
    answer = ask(client, temperature=0.8)
    sampler = service.sampler
    prompt = encode_prompt(sampler.tokenizer, Problem("p", tuple(HELLO), ""))
    pieces = list(sampler.stream(prompt, Sampling(1, 24, 0.8), ("serve", 1, 0)))
    assert texts(answer) == ["".join(piece.text for piece in pieces)]
    sampled = sum(len(piece.sampled) for piece in pieces)
    used = {"prompt_tokens": len(prompt), "completion_tokens": sampled, "total_tokens": len(prompt) + sampled}
    assert answer["usage"] == used and answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-") and ask(client, TEXT)["id"].startswith("cmpl-")
    assert answer["choices"][0]["finish_reason"] == pieces[-1].finish_reason
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stop": ["a", "e"], "n": 2}, {"max_tokens": 3}])
def test_a_stream_is_the_whole_answer(client: httpx2.Client, path: str, fields: dict[str, Any]):
    logprobs = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    whole = ask(client, path, **fields, **logprobs)
    pieces = chunks(client, path, **fields, **logprobs, stream_options={"include_usage": True})
    assert pieces[-1]["usage"] == whole["usage"] and pieces[-1]["choices"] == []
    assert all(piece["usage"] is None for piece in pieces[:-1]) and len({piece["id"] for piece in pieces}) == 1
    for choice in whole["choices"]:
        of_it = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        key = "content" if path == CHAT else "tokens"
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert "".join(c["delta"]["content"] if path == CHAT else c["text"] for c in of_it) == text
        assert [t for c in of_it for t in c["logprobs"][key]] == choice["logprobs"][key]
        assert [c["finish_reason"] for c in of_it if c["finish_reason"]] == [choice["finish_reason"]]
        if path == CHAT:
            assert [("role" in c["delta"]) for c in of_it] == [True, *[False] * (len(of_it) - 1)]


def test_answers_of_one_request_differ_and_are_those_of_the_seed(client: httpx2.Client):
    three = texts(ask(client, n=3))
    assert len(set(three)) == 3 and texts(ask(client, n=3)) == three
    assert texts(ask(client)) == three[:1]  # the first of several is the one alone
    assert texts(ask(client, seed=2)) != three[:1]
    unseeded = {texts(ask(client, seed=None))[0] for _ in range(4)}
    assert len(unseeded) > 1


def test_log_probabilities_are_those_of_the_model(client: httpx2.Client, service: Service):
    """At the temperature of the request, against a plain forward pass; tokens and bytes spell the text."""
    answer = ask(client, TEXT, logprobs=2, temperature=0.7, max_tokens=12)["choices"][0]
    found, prompt = answer["logprobs"], encode_text(service.sampler.tokenizer, "hello")
    pieces = service.sampler.stream(prompt, Sampling(1, 12, 0.7), ("serve", 1, 0))
    sampled = [t.id for piece in pieces for t in piece.sampled][: len(found["tokens"])]
    ids = torch.cat([prompt, torch.tensor(sampled)])
    with torch.no_grad():
        logp = torch.log_softmax(tiny()[0](ids[None]).logits[0] / 0.7, -1)[len(prompt) - 1 : -1]
    of_tokens = logp.gather(1, ids[len(prompt) :, None])[:, 0]
    assert len(sampled) > 3 and torch.allclose(torch.tensor(found["token_logprobs"]), of_tokens, atol=1e-5)
    best = torch.tensor([max(top.values()) for top in found["top_logprobs"]])
    assert torch.allclose(best, logp.amax(1), atol=1e-5)
    assert found["text_offset"] == sorted(found["text_offset"]) and found["text_offset"][0] == 0
    content = ask(client, logprobs=True, top_logprobs=1, max_tokens=12)["choices"][0]
    tokens = content["logprobs"]["content"]
    data = b"".join(bytes(t["bytes"]) for t in tokens)
    assert data.decode(errors="replace") == content["message"]["content"] and len(tokens[0]["top_logprobs"]) == 1


def test_a_stop_text_ends_the_answer_before_it(client: httpx2.Client):
    text = texts(ask(client, TEXT, max_tokens=20))[0]
    stop = text[4:6]
    answer = ask(client, TEXT, max_tokens=20, stop=stop)["choices"][0]
    assert answer["text"] == text[: text.index(stop)] and answer["finish_reason"] == "stop"


def test_texts_and_ids_are_prompts(client: httpx2.Client, service: Service):
    ids = service.sampler.tokenizer("hello")["input_ids"]
    alone = texts(ask(client, TEXT, n=2))
    assert texts(ask(client, TEXT, prompt=ids, n=2)) == alone
    both = ask(client, TEXT, prompt=["hello", "bye"], n=2)
    assert texts(both)[:2] == alone == texts(ask(client, TEXT, prompt=[ids, [5]], n=2))[:2]
    assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3] and texts(both)[2:] == texts(
        ask(client, TEXT, prompt="bye", n=2)
    )


def test_parts_of_a_message_are_its_text(client: httpx2.Client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert texts(ask(client, messages=[{"role": "user", "content": parts}])) == texts(ask(client))


def test_the_models(client: httpx2.Client):
    listed = client.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["tiny"] and listed["object"] == "list"
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    assert client.get("/v1/models/gpt-5").json()["error"]["code"] == "model_not_found"


def test_a_model_whose_name_is_quoted_in_an_address(service: Service):
    with served(replace(service, name="my run/é")) as client:
        assert client.get(f"/v1/models/{quote('my run/é', safe='')}").json()["id"] == "my run/é"


def test_requests_at_once_are_answered_as_alone(client: httpx2.Client):
    """Twelve threads, more than are answered at once; several token streams are under way together."""
    asked = [
        {"seed": i % 5, "messages": [{"role": "user", "content": "x" * (1 + i)}], "max_tokens": 9} for i in range(12)
    ]
    alone = [texts(ask(client, **fields)) for fields in asked]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(lambda fields: texts(ask(client, **fields)), asked)) == alone


def test_the_lock_goes_to_who_waits_longest():
    lock, order = FairLock(), []

    def take(name: str) -> None:
        for _ in lock.taken_by(iter(range(50))):
            order.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in "ab"]
    with lock:
        for thread in threads:
            thread.start()
        while lock._last < 3:  # both wait
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a"] * 50 + ["b"] * 50 and "".join(order).count("aaaa") == 0


# Who may ask


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/models", "/v1/models/tiny", "/v1/nothing"])
@pytest.mark.parametrize(
    "sent", [None, "Bearer wrong", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer", "Bearer é"]
)
def test_nobody_is_answered_without_the_key(client: httpx2.Client, path: str, sent: str | None):
    headers = {} if sent is None else {"Authorization": sent.encode()}
    body = json.dumps({"model": "tiny", "messages": HELLO, "prompt": "x"})
    method = "GET" if "models" in path else "POST"
    with httpx2.Client(base_url=client.base_url) as stranger:
        answer = stranger.request(method, path, headers=headers, content=body)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text


def test_the_scheme_of_the_key_is_of_either_case(client: httpx2.Client):
    assert client.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_the_state_is_open_to_all(client: httpx2.Client):
    with httpx2.Client(base_url=client.base_url) as stranger:
        assert stranger.get("/health").json() == {"status": "ok"}


def test_there_is_no_server_without_a_token(service: Service):
    with pytest.raises(ValueError, match="token"):
        Service(service.sampler, "tiny", "")


def hello(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    """A conversation of one message."""
    return {"messages": [{"role": "user", "content": content, **fields}]}


BAD: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT, {"model": "gpt-5"}, 404, "model", "'tiny'"),
    (CHAT, {"n": 0}, 400, "n", "from 1 to 64"),
    (CHAT, {"n": 65}, 400, "n", "from 1 to 64"),
    (CHAT, {"n": "2"}, 400, "n", "int"),
    (CHAT, {"temperature": -1}, 400, "temperature", "temperature=-1"),
    (CHAT, {"top_p": 0}, 400, "top_p", "top_p=0"),
    (CHAT, {"max_tokens": -3}, 400, "max_tokens", "max_tokens=-3"),
    (TEXT, {"max_tokens": 0}, 400, "max_tokens", "max_tokens=0"),
    (CHAT, {"max_completion_tokens": -3}, 400, "max_completion_tokens", "max_completion_tokens=-3"),
    (CHAT, {"max_completion_tokens": 10**6}, 400, "max_completion_tokens", "room for"),
    (CHAT, {"max_tokens": 10**7}, 400, "max_tokens", "room for"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "max_completion_tokens=6, max_tokens=5"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
    (CHAT, {"top_logprobs": 3}, 400, "top_logprobs", "logprobs=true"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "0 to 20"),
    (CHAT, {"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    (CHAT, {"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format", "text"),
    (CHAT, {"response_format": {"json_schema": {}}}, 400, "response_format", "text"),
    (CHAT, {"min_p": 0.1}, 400, "min_p", "unknown field"),
    (CHAT, {"stop": ["a"] * 5}, 400, "stop", "at most 4"),
    (CHAT, {"stop": ""}, 400, "stop", "empty"),
    (CHAT, {"messages": []}, 400, "messages", "none"),
    (CHAT, {"messages": "hello"}, 400, "messages", "array"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages", "role='king'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages", "text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "text"),
    (CHAT, hello([{"type": "text", "text": "x", "y": 1}]), 400, "messages", "text"),
    (CHAT, hello(tool_cals=[1]), 400, "messages", "tool_cals"),
    (CHAT, hello(function_call={"name": "f"}), 400, "messages", "function_call"),
    (CHAT, hello(weight=0), 400, "messages", "weight"),
    (CHAT, hello(name=5), 400, "messages", "name"),
    (CHAT, hello("x" * 5000), 400, "messages", "2,048 positions; shorten"),
    (CHAT, hello("x" * 10**6), 400, "messages", "tokens or more"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, ""),
    (TEXT, {"prompt": ""}, 400, "prompt", "no tokens"),
    (TEXT, {"prompt": []}, 400, "prompt", "none"),
    (TEXT, {"prompt": [[]]}, 400, "prompt", "token ids"),
    (TEXT, {"prompt": [-1]}, 400, "prompt", "token ids"),
    (TEXT, {"prompt": [True]}, 400, "prompt", "token ids"),
    (TEXT, {"prompt": [5000]}, 400, "prompt", "prompt: token id 5000"),
    (TEXT, {"prompt": "x" * 5000}, 400, "prompt", "the prompt has 5,000 tokens"),
    (TEXT, {"prompt": "x" * 10**6}, 400, "prompt", "the prompt has 100,000 tokens or more"),
    (TEXT, {"prompt": ["a"] * 65}, 400, "prompt", "65 of them with n=1"),
    (TEXT, {"prompt": ["a"] * 2, "n": 33}, 400, "prompt", "from 1 to 64"),
    (TEXT, {"prompt": [1.5]}, 400, "prompt", "token ids"),
    (TEXT, {"echo": True}, 400, "echo", "not supported"),
    (TEXT, {"best_of": 3}, 400, "best_of", "set n"),
    (TEXT, {"logprobs": -1}, 400, "logprobs", "0 to 20"),
]


@pytest.mark.parametrize(("path", "fields", "status", "param", "told"), BAD)
def test_what_cannot_be_done_is_refused_in_the_shape_of_the_api(
    client: httpx2.Client, path: str, fields: dict[str, Any], status: int, param: str | None, told: str
):
    body = {"model": "tiny"} | ({"messages": HELLO} if path == CHAT else {"prompt": "hello"}) | fields
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and told in error["message"], answer.text
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert texts(ask(client))  # and the server goes on


@pytest.mark.parametrize(
    ("path", "fields", "code"),
    [
        (CHAT, {"max_completion_tokens": 10**6}, "context_length_exceeded"),
        (CHAT, hello("x" * 5000), "context_length_exceeded"),
        (TEXT, {"prompt": "x" * 10**6}, "context_length_exceeded"),
        (TEXT, {"prompt": [5000]}, None),
        (TEXT, {"max_tokens": 0}, None),
        (CHAT, hello(audio={}, tool_calls=[{}]), "unsupported_parameter"),
    ],
)
def test_programs_tell_errors_by_their_code(client: httpx2.Client, path: str, fields: dict[str, Any], code: str | None):
    body = {"model": "tiny"} | ({"messages": HELLO} if path == CHAT else {"prompt": "hello"}) | fields
    assert client.post(path, json=body).json()["error"]["code"] == code


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "gpt-5"},
        {"prompt": ["a"] * 8000},
        {"prompt": "x" * 10**6},
        {"temperature": -1},
        {"max_tokens": 0},
        {"stop": ""},
        {"logprobs": 21},
        {"stream_options": {}},
        {"model": "gpt-5", "messages": HELLO},
        {"n": 65, "messages": HELLO},
        hello("x" * 10**6),
        {"max_tokens": 5, "max_completion_tokens": 6, "messages": HELLO},
    ],
)
def test_what_is_refused_is_not_tokenised_first(
    client: httpx2.Client, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    for name in ("encode_text", "encode_prompt"):
        monkeypatch.setattr(requests, name, lambda *_: pytest.fail("it is tokenised"))
    path = CHAT if "messages" in fields else TEXT
    answer = client.post(path, json={"model": "tiny"} | ({} if path == CHAT else {"prompt": "x"}) | fields)
    assert answer.status_code in (400, 404), answer.text


def test_an_answer_without_a_limit_of_its_own_has_the_room_there_is(client: httpx2.Client):
    """Of a text as of a chat; a limit that is sent must fit."""
    ids = [66] * 2040
    assert ask(client, TEXT, prompt=ids)["usage"]["completion_tokens"] <= 8
    for limit, status in ((8, 200), (9, 400)):
        body = {"model": "tiny", "prompt": ids, "max_tokens": limit}
        assert client.post(TEXT, json=body).status_code == status
    assert ask(client, max_tokens=3, max_completion_tokens=3)["usage"]["completion_tokens"] <= 3


def test_a_message_that_was_an_answer_can_be_sent_back(client: httpx2.Client):
    """With the nulls that clients add to it."""
    nulls = {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    messages = [*HELLO, {"role": "assistant", "content": "x", **nulls}, *HELLO]
    assert texts(ask(client, messages=messages)) == texts(
        ask(client, messages=[*HELLO, {"role": "assistant", "content": "x"}, *HELLO])
    )


def test_a_template_that_refuses_a_system_message():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    with served(Service(sampler_of(refusing), "tiny", KEY)) as client:
        error = client.post(CHAT, json={"model": "tiny", "messages": messages}).json()["error"]
    assert error["param"] == "messages" and "no system; it may do without the system message" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"model": "tiny"}', b"null"])
def test_a_body_that_is_no_request(client: httpx2.Client, body: bytes):
    answer = client.post(CHAT, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_addresses_and_methods_that_there_are_not(client: httpx2.Client):
    for answer in (client.post("/v1/embeddings", json={}), client.get("/"), client.get("/v1/models/")):
        assert answer.status_code == 404 and "/v1/models" in answer.json()["error"]["message"]
    for method, path, allowed in (
        ("GET", CHAT, "POST"),
        ("HEAD", TEXT, "POST"),
        ("DELETE", CHAT, "POST"),
        ("OPTIONS", TEXT, "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD"),
        ("PUT", "/health", "GET, HEAD"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == allowed
        assert method == "HEAD" or answer.json()["error"]["type"] == "invalid_request_error"
    assert client.request("BREW", "/").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/v1/models/gpt-5"])
def test_head_is_get_without_a_body(client: httpx2.Client, path: str):
    got, head = client.get(path), client.head(path)
    names = ("content-type", "content-length")
    assert head.status_code == got.status_code and head.content == b"" and len(got.content) > 0
    assert [head.headers[name] for name in names] == [got.headers[name] for name in names]
    raw_head = raw(client, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert raw_head.endswith(b"\r\n\r\n")


def test_a_trainer_at_this_server_is_told_the_other(client: httpx2.Client, monkeypatch: pytest.MonkeyPatch):
    """By its first call, although its token is in a header of its own."""
    monkeypatch.setenv(TOKEN, KEY)
    trainer = rollout_server.Server(str(client.base_url), 10.0, 1, "tiny")
    with pytest.raises(InputError, match="speaks OpenAI's API; the rollout server is `drpo serve-rollouts`"):
        trainer.dtype()
    with httpx2.Client(base_url=client.base_url) as stranger:
        assert {stranger.post(path).status_code for path in CALLS} == {404}


# What a client may cost


def raw(client: httpx2.Client, data: bytes) -> bytes:
    """What the server answers to bytes, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) as line:
        line.sendall(data)
        got = b""
        while part := line.recv(2**16):
            got += part
        return got


def head(**headers: Any) -> bytes:
    given = {"Host": "x", "Authorization": f"Bearer {KEY}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST {CHAT} HTTP/1.1\r\n{lines}\r\n".encode()


def test_a_request_is_of_bounded_size(client: httpx2.Client):
    for length in (2**20 + 1, "9" * 5000, "9" * 13):
        assert b" 413 " in raw(client, head(Content_Length=length))
    for headers in ({}, {"Content_Length": "-1"}, {"Content_Length": "1e3"}, {"Transfer_Encoding": "chunked"}):
        assert b" 411 " in raw(client, head(**headers))
    assert b" 431 " in raw(client, head(**{f"X-{i}": "x" for i in range(200)}))
    assert b" 414 " in raw(client, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")


def test_a_request_that_does_not_arrive_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "PATIENCE_S", 0.2)
    with served(service) as client:
        began = time.monotonic()
        assert raw(client, b"POST ") == b"" and raw(client, head(Content_Length=10) + b"{") == b""
        assert time.monotonic() - began < 5.0


def test_connections_beyond_the_bound_are_refused(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http, "CONNECTIONS", 2)
    with served(service) as client:
        address = ("127.0.0.1", client.base_url.port)
        held = [socket.create_connection(address) for _ in range(2)]
        time.sleep(0.1)
        assert b" 503 " in raw(client, b"")
        for line in held:
            line.close()
        time.sleep(0.1)
        assert texts(ask(client))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_its_answer(
    client: httpx2.Client, service: Service, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    sampled, closed = [], threading.Event()
    of_engine = service.sampler.engine.stream

    def slow(request: Any) -> Iterator[Any]:
        try:
            for token in of_engine(request):
                sampled.append(token)
                time.sleep(0.005)
                yield token
        finally:
            closed.set()

    monkeypatch.setattr(service.sampler.engine, "stream", slow)
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1500, "stream": stream, "n": 60}).encode()
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as line:
        line.sendall(head(Content_Length=len(body)) + body)
        while len(sampled) < 3:
            time.sleep(0.005)
    assert closed.wait(5)
    time.sleep(0.2)
    count = len(sampled)
    time.sleep(0.1)
    assert len(sampled) == count < 200


def never_ending(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answers that do not end by themselves; returns what is sampled of them."""
    sampled: list[int] = []

    def stream(request: Any) -> Iterator[SampledToken]:
        for i in itertools.count():
            sampled.append(i)
            time.sleep(0.002)
            yield SampledToken(66, -0.5)

    monkeypatch.setattr(service.sampler.engine, "stream", stream)
    return sampled


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_closes_ends_its_answers(service: Service, stream: bool, monkeypatch: pytest.MonkeyPatch):
    """Those that are sampled, those that wait for a place, and a request that arrives; no thread is left in torch."""
    sampled = never_ending(service, monkeypatch)
    server = Server(("127.0.0.1", 0))
    server.open(replace(service, lock=FairLock()))
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1500, "stream": stream}).encode()
    with ExitStack() as lines:
        forever = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        forever.start()
        for _ in range(http.AT_ONCE + 2):
            line = lines.enter_context(socket.create_connection(server.server_address))
            line.sendall(head(Content_Length=len(body)) + body)
        line.sendall(b"POST ")
        lines.enter_context(socket.create_connection(server.server_address)).sendall(b"GET ")
        while len(sampled) < 30 or len(server._connections) < http.AT_ONCE + 3:
            time.sleep(0.005)
        threads = list(server._connections)
        server.shutdown()
        forever.join()
        began = time.monotonic()
        assert server.close() and not any(thread.is_alive() for thread in threads)
        assert time.monotonic() - began < http.CLOSING_S / 2
    count = len(sampled)
    time.sleep(0.05)
    assert len(sampled) == count


@pytest.mark.parametrize("is_stuck", [False, True])
def test_ctrl_c_leaves_python_only_when_no_thread_is_in_torch(
    service: Service, is_stuck: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A thread that does not come back is the one reason for which the process ends without Python's own end."""
    monkeypatch.setattr(http, "CLOSING_S", 0.2)
    sampled, comes_back, ends = never_ending(service, monkeypatch), threading.Event(), []
    server = Server(("127.0.0.1", 0))
    server.open(replace(service, lock=FairLock()))
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1500}).encode()

    with monkeypatch.context() as patch, socket.create_connection(server.server_address) as line:
        if is_stuck:
            patch.setattr(service.sampler.engine, "stream", lambda _: iter([sampled.append(0), comes_back.wait()]))
        patch.setattr(serve, "made_server", lambda *_: server)
        patch.setattr(server, "service_actions", lambda: signal.default_int_handler(2, None) if sampled else None)
        patch.setattr(os, "_exit", ends.append)
        line.sendall(head(Content_Length=len(body)) + body)
        with pytest.raises(KeyboardInterrupt):
            serve.serve("tiny", ServeOptions())
    assert ends == [130] * is_stuck and ("interrupted" in capsys.readouterr().err) == is_stuck
    comes_back.set()


@pytest.mark.slow
def test_ctrl_c_while_the_command_answers():
    """The process ends with status 130 and one line; it aborted where a thread was inside torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TOKEN: KEY, "OMP_NUM_THREADS": "1"}
    program = "import signal, sys; from drpo.__main__ import main; "
    program += "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"  # a shell may ignore it
    command = [sys.executable, "-c", program, "serve", "tiny", "--port", "0"]
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1900, "n": 30}).encode()
    for _ in range(2):
        with (
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
            ExitStack() as lines,
        ):
            assert process.stdout is not None and process.stderr is not None
            port = int(process.stdout.readline().split(b"127.0.0.1:")[1].split(b"/")[0])
            for _ in range(2):
                line = lines.enter_context(socket.create_connection(("127.0.0.1", port)))
                line.sendall(head(Content_Length=len(body)) + body)
            time.sleep(2.0)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130 and process.stderr.read() == b"drpo: interrupted\n"


def test_logits_that_are_not_finite_are_an_error(service: Service):
    model, tokenizer = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with served(Service(Sampler.of(model, tokenizer, precision="fp32"), "tiny", KEY)) as client:
        answer = client.post(TEXT, json={"model": "tiny", "prompt": "x"})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        with client.stream("POST", TEXT, json={"model": "tiny", "prompt": "x", "stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert len(lines) == 1 and "error" in json.loads(lines[0].removeprefix("data: "))


def test_the_bytes_of_tokens():
    _, tokenizer = tiny()
    assert b"".join(token_bytes(tokenizer, i) for i in tokenizer("≤ é\n")["input_ids"]) == "≤ é\n".encode()
    assert token_bytes(tokenizer, 0) == b"<eos>"


# The command


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "sampler_of", lambda *_: pytest.fail("it loads the model first"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "name another" in refused(["serve", "tiny", "--port", str(other.getsockname()[1])])


def test_a_server_takes_no_connections_until_it_is_opened():
    server = Server(("127.0.0.1", 0))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.server_address)
    assert server.close()


def test_the_command_serves_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv(TOKEN, "")
    server = made_server("tiny", ServeOptions(port=0))
    key = os.environ[TOKEN]
    told = capsys.readouterr().out
    assert f"OPENAI_BASE_URL=http://127.0.0.1:{server.server_address[1]}/v1 OPENAI_API_KEY={key}" in told
    assert len(key) >= 32 and server.server_address[0] == "127.0.0.1" and server.service.token == key
    line = refused(["serve", "tiny", "--port", str(server.server_address[1])])
    assert "name another" in line
    assert key not in capsys.readouterr().out  # one that is given is not printed
    server.server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_address_that_is_printed_answers(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Also with a token that has blanks around it, as a client sends it."""
    monkeypatch.setenv(TOKEN, f" {KEY}\n")
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    server = made_server("tiny", ServeOptions(host=host, port=0))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = capsys.readouterr().out.split("OPENAI_BASE_URL=")[1].split()[0]
    try:
        assert httpx2.get(f"{address}/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    finally:
        server.shutdown()
        assert server.close()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a run's folder or a model"),
        (["tiny", "--", "--max-num-seqs", "4"], "drpo serve-rollouts"),
        (["tiny", "--host", "0.0.0.0"], "ssh -N -L 8000"),
        (["tiny", "--host", "example.org"], "--host example.org"),
        (["tiny", "--port", "70000"], "--port 70000"),
        (["tiny", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["smolm2-135m"], "smollm2-135m"),
        (["tiny", "--prot", "1"], "did you mean '--port'"),
    ],
)
def test_serve_refuses_in_one_line(arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Server, "serve_forever", lambda self: pytest.fail("it would have begun"))
    assert told in refused(["serve", *arguments])


# OpenAI's own client


def test_openai_client(client: httpx2.Client):
    """Whole and streamed answers, log-probabilities, several answers, text completions, errors."""
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key=KEY, max_retries=0)
    assert [m.id for m in api.models.list()] == ["tiny"]
    asked = {"model": "tiny", "messages": HELLO, "seed": 1, "logprobs": True, "top_logprobs": 2, "max_tokens": 9}
    whole = api.chat.completions.create(**asked, n=2)
    assert [c.message.content for c in whole.choices] == texts(ask(client, n=2, max_tokens=9))
    assert whole.usage.completion_tokens > 0 and len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = list(api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [c for chunk in stream for c in chunk.choices]
    assert "".join(c.delta.content for c in pieces) == whole.choices[0].message.content
    assert [t.logprob for c in pieces for t in c.logprobs.content] == [
        t.logprob for t in whole.choices[0].logprobs.content
    ]
    assert stream[-1].usage.total_tokens > 0 and pieces[-1].finish_reason in ("stop", "length")
    text = api.completions.create(model="tiny", prompt="hello", seed=1, logprobs=1, max_tokens=5)
    assert len(text.choices[0].logprobs.token_logprobs) == len(text.choices[0].logprobs.tokens)
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        api.chat.completions.create(**asked | {"model": "gpt-5"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        api.chat.completions.create(**asked, temperature=-1)
    with pytest.raises(openai.AuthenticationError, match="token"):
        api.with_options(api_key="wrong").models.list()
