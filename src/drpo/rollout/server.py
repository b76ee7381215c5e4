"""Rollouts by a vLLM server (`drpo serve-rollouts`): requests over HTTP, weights through a shared folder."""

import json
import logging
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from socket import SHUT_RDWR
from threading import Timer
from typing import Any
from urllib.parse import urlsplit

import torch
import urllib3
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from drpo.credentials import headers, without_secrets
from drpo.errors import InputError, as_typed
from drpo.model.loading import named_tensors
from drpo.model.positions import sequence_limit
from drpo.model.routing import experts_by_layer
from drpo.rollout.routes import with_shared_prompts
from drpo.rollout.server_answer import columns
from drpo.rollout.vllm_request import parameters, read_generation, require_known
from drpo.rollout.weight_sync import WeightSync
from drpo.types import Generation, Request

log = logging.getLogger("drpo")

CONNECT_S = 5.0

MOST_BYTES = 2**20
"""Of an answer, beside what it says of each token."""
_PER_TOKEN = 1024
"""Most bytes that JSON takes for a token with its log-probability: vLLM's own take about 150."""
_PIECE = 2**16

DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""Dtypes of a weight sync other than bfloat16, which also serves fp8."""


@dataclass(frozen=True)
class Patience:
    """Time limits and retries of requests to a server.

    Args:
        request_s: time limit of one request.
        attempts: attempts in all.
        pause_s: pause before the second attempt; it doubles for each later one, up to `longest_pause_s`.
        longest_pause_s: upper bound of a pause. The defaults wait six minutes in all, time to start another server.
    """

    request_s: float = 300.0
    attempts: int = 12
    pause_s: float = 1.0
    longest_pause_s: float = 60.0


class ServerEngine:
    """Samples with a vLLM server of `drpo serve-rollouts`, on this machine or on one that shares a folder with it.

    Requests run concurrently. A weight sync writes a file to `folder`; the server loads it, clears its key-value cache,
    and labels its responses from then on. A response with another label was sampled with other weights (the server was
    restarted, or another run sent its own): it is discarded, and the weights are sent again.

    Failed calls are retried a bounded number of times, with growing pauses.

    Args:
        address: http://host:port.
        model: the served transformers model.
        folder: folder for the weights, at the same path on both machines; None uses a temporary one on this machine.
        patience: time limits and retries.
        concurrency: upper bound of concurrent requests.
        routes: report the experts that a mixture's routers choose (`Generation.routes`); the server must have been
            started with `--enable-return-routed-experts`.

    Attributes:
        version: the weights' version.

    Raises:
        InputError: there is no such server, or `drpo serve-rollouts` did not start it; or routes of a model without
            experts.
    """

    def __init__(
        self,
        address: str,
        model: PreTrainedModel,
        *,
        folder: Path | None = None,
        patience: Patience | None = None,
        concurrency: int = 128,
        routes: bool = False,
    ) -> None:
        if (limit := sequence_limit(model)).tokens is not None:
            raise InputError(
                f"engine={address}: how a server computes {limit.kind} rotary embeddings depends on how it was "
                "started; set --engine transformers, or vllm"
            )
        self.version = 0
        self._experts = experts_by_layer(model) if routes else None
        layers = int(model.config.get_text_config().num_hidden_layers)
        # Of each token: most numbers of experts that are reported, of two bytes, four characters for three bytes.
        self._route_bytes = 0 if self._experts is None else 3 * layers * max(self._experts.values())
        self._weight_sync, self._vocabulary = WeightSync(model), int(model.config.get_text_config().vocab_size)
        self._patience = patience or Patience()
        self._server = Server(address, self._patience.request_s, concurrency, model.name_or_path)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="drpo-rollout")
        self._scratch = tempfile.TemporaryDirectory(prefix="drpo-weights-", dir=folder)
        self._run, self._loads = uuid.uuid4().hex, 0
        self._sent: str | None = None  # the label of the weights that the server was last seen to have
        try:
            self._dtype = self._server.dtype()
        except UnreachableError as problem:
            self.close()
            raise self._server.gone(f"cannot be reached ({problem})") from None
        self._stage(named_tensors(model))

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Return one generation per request, in order.

        Raises:
            InputError: the server failed in all attempts (`Patience`), or its responses are invalid.
        """
        require_known(requests, self._vocabulary)
        done: dict[int, Generation] = {}
        for attempt in range(self._patience.attempts):
            failure = self._attempt(requests, done)
            if failure is None:
                return with_shared_prompts([done[i] for i in range(len(requests))])
            if attempt + 1 < self._patience.attempts:
                self._wait(attempt, f"{len(requests) - len(done)} of {len(requests)} requests failed ({failure})")
        raise self._server.gone(f"gave no usable answer in {self._patience.attempts} attempts ({failure})")

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Send new weights; if the server is unreachable, the next `generate` sends them and waits for it.

        So a server that dies between two rollouts ends the run, if at all, in a rollout, after all was saved.
        """
        self._stage(state)
        self.version = version
        try:
            self._send()
        except UnreachableError as problem:
            log.warning(
                "%s did not take the weights (%s); they are sent before the next rollout", self._server, problem
            )

    def release(self) -> None:
        """Do nothing: the server's prefix cache drops what it needs the room for."""

    def close(self) -> None:
        """End the requests under way and remove the file of weights; the server continues with its weights."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._server.close()  # else Python would wait for their threads as it ends
        self._scratch.cleanup()

    @property
    def _label(self) -> str:
        return f"{self._run}-{self._loads}"

    @property
    def _file(self) -> Path:
        return Path(self._scratch.name) / "weights.safetensors"

    def _stage(self, state: Mapping[str, Tensor]) -> None:
        """Write the weights, rounded as the server would."""
        tensors = self._weight_sync.checkpoint(state)
        save_file({n: t.to(self._dtype).cpu().contiguous() for n, t in tensors.items()}, self._file)
        self._loads += 1  # not the version: other weights may come under the same
        self._sent = None

    def _send(self) -> None:
        self._server.load(self._file, self._label)
        self._sent = self._label

    def _attempt(self, requests: Sequence[Request], done: dict[int, Generation]) -> str | None:
        """Ask for what is not done; return None where all is, else what went wrong with one of them."""
        try:
            if self._sent is None:
                self._send()
        except UnreachableError as problem:
            return str(problem)
        missing = [i for i in range(len(requests)) if i not in done]
        answers = list(self._threads.map(lambda i: self._ask(requests[i]), missing))
        for i, answer in zip(missing, answers, strict=True):
            if isinstance(answer, Generation):
                done[i] = answer
        failures = [answer for answer in answers if isinstance(answer, UnreachableError)]
        if any(isinstance(failure, OtherWeightsError) for failure in failures):
            self._sent = None
        return str(failures[0]) if failures else None

    def _ask(self, request: Request) -> "Generation | UnreachableError":
        """Return a generation; a failure worth a retry is returned too, so that the other answers are kept."""
        # The server's list begins with the sampled token, which may not be among the k most probable.
        k = request.sampling.top_logprobs
        more = {"logprobs": k + 1} if 0 < k < self._vocabulary else {}
        try:
            prompt, sampling = request.prompt_ids.tolist(), parameters(request) | more
            drawn = self._server.draw(prompt, sampling, self._label, self._route_bytes)
            return read_generation(
                request, **drawn, vocabulary=self._vocabulary, version=self.version, experts=self._experts
            )
        except UnreachableError as problem:
            return problem

    def _wait(self, attempt: int, reason: str) -> None:
        pause = min(self._patience.pause_s * 2**attempt, self._patience.longest_pause_s)
        log.warning(
            "%s: %s; again in %.1f s (attempt %d of %d)",
            self._server, reason, pause, attempt + 2, self._patience.attempts,
        )  # fmt: skip
        time.sleep(pause)


class UnreachableError(Exception):
    """The server is unreachable or failed; a retry may succeed."""


class OtherWeightsError(UnreachableError):
    """The server sampled with other weights than the last that it was sent."""


class _Lines:
    """The sockets on which answers are waited for; all can be shut at once."""

    def __init__(self) -> None:
        self._waiting: set[Any] = set()
        self._closed = False

    def close(self) -> None:
        """Shut them all, and every later one."""
        self._closed = True
        for line in list(self._waiting):
            _shut(line)

    @contextmanager
    def ended_at(self, until: float, line: Any) -> Iterator[None]:
        """Shut a socket at the time `until`.

        A socket's own timeout begins anew with every piece that arrives, so an answer that drips would never end: in
        its header, in informational (1xx) answers before it, or in the trailer after its body.
        """
        timer = Timer(max(0.0, until - time.monotonic()), _shut, [line])
        timer.daemon = True
        timer.start()
        self._waiting.add(line)
        if self._closed:
            _shut(line)
        try:
            yield
        except (urllib3.exceptions.HTTPError, HTTPException, OSError):
            if time.monotonic() < until:
                raise
            raise UnreachableError("no whole answer within the time limit") from None
        finally:
            self._waiting.discard(line)
            timer.cancel()
        if time.monotonic() > until:
            raise UnreachableError("no whole answer within the time limit")


def _shut(line: Any) -> None:
    with suppress(OSError, AttributeError):  # already closed, or never opened
        line.shutdown(SHUT_RDWR)


class _Timely:
    """Part of a connection class: the head of an answer must arrive within the time limit, even if it drips.

    Args:
        lines: the server's.
        arguments, options: of urllib3's connection.

    Attributes:
        answering: the socket of the last answer.
    """

    answering: Any = None

    def __init__(self, *arguments: Any, lines: _Lines, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lines = lines

    def getresponse(self) -> Any:
        here: Any = self
        self.answering = here.sock
        with self._lines.ended_at(time.monotonic() + here.timeout, here.sock):
            return super().getresponse()  # type: ignore[misc]


class _HTTP(_Timely, urllib3.connection.HTTPConnection):
    pass


class _HTTPS(_Timely, urllib3.connection.HTTPSConnection):
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPS


class Server:
    """The client of a vLLM server; safe to use from many threads.

    Args:
        address: http://host:port.
        limit_s: longest time of a call.
        connections: most connections that are kept open.
        model: name of the model, for the command in messages that starts a server.
    """

    def __init__(self, address: str, limit_s: float, connections: int, model: str) -> None:
        self._address = address.rstrip("/")
        self._headers = headers()
        self._model = model or "MODEL"
        self._limit_s = limit_s
        self._limit = urllib3.Timeout(connect=min(CONNECT_S, limit_s), read=limit_s)
        self._pool = urllib3.PoolManager(maxsize=connections, block=True)
        self._lines = _Lines()
        pools: Any = {"http": partial(_HTTPPool, lines=self._lines), "https": partial(_HTTPSPool, lines=self._lines)}
        self._pool.pool_classes_by_scheme = pools

    def __str__(self) -> str:
        return f"vLLM server {self._address}"

    def close(self) -> None:
        """End the calls under way, and those to come; the server is left as it is."""
        self._lines.close()

    def dtype(self) -> torch.dtype:
        """Return the floating-point type of the server's weights."""
        results = self._rpc("drpo_dtype")
        if not results or not isinstance(results[0], dict):
            raise self.gone("was not started by `drpo serve-rollouts`")
        return DTYPES.get(str(results[0].get("dtype")), torch.bfloat16)

    def load(self, file: Path, label: str) -> None:
        """Load the weights in a file, clear the prefix cache, and set the label of later answers."""
        self._rpc("drpo_load_file", str(file))
        # Requests that still run were given up by this client.
        if not self._post("/reset_prefix_cache?reset_running_requests=true").get("success"):
            raise UnreachableError("it kept its prefix cache, whose keys are those of the old weights")
        self._post("/update_weight_version", {"new_version": label})

    def draw(
        self, prompt_ids: list[int], sampling: Mapping[str, Any], label: str, route_bytes: int = 0
    ) -> dict[str, Any]:
        """Sample one row with vLLM's sampling parameters; return arguments of `read_generation`.

        Args:
            prompt_ids: P token ids.
            sampling: vLLM's sampling parameters.
            label: of the weights.
            route_bytes: most bytes that the answer has of the experts of each token; 0 reads none.

        Raises:
            OtherWeightsError: it was sampled with weights of another label.
            UnreachableError: there was no answer.
            InputError: the answer is not vLLM's.
        """
        answer = self._post(
            "/inference/v1/generate",
            {"token_ids": prompt_ids, "sampling_params": sampling},
            most=MOST_BYTES
            + _PER_TOKEN * sampling["max_tokens"] * (2 + sampling["logprobs"])
            + route_bytes * (len(prompt_ids) + sampling["max_tokens"]),
        )
        try:
            (choice,) = answer["choices"]
            labels = {span["version"] for span in choice["weight_versions"]}
            if labels != {label}:
                raise OtherWeightsError("it has other weights: it was restarted, or another run sent its own")
            return columns(choice, routes=route_bytes > 0)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self.gone(
                f"gave an answer that is not vLLM's ({type(error).__name__}: {_quoted(str(error))})"
            ) from None

    def _read(self, response: urllib3.BaseHTTPResponse, most: int, until: float) -> bytes:
        """Return the body of an answer.

        Raises:
            InputError: it is longer than `most` bytes.
            UnreachableError: it has not arrived at the time `until`.
        """
        body = bytearray()
        with self._lines.ended_at(until, getattr(response.connection, "answering", None)):
            while piece := response.read1(_PIECE):
                body += piece
                if len(body) > most:
                    response.close()
                    raise self.gone(f"gave an answer of more than {most:,} bytes, more than was asked for")
        response.release_conn()
        return bytes(body)

    def gone(self, what: str) -> InputError:
        """Return an error that says what is wrong with the server, and how to start one."""
        port = urlsplit(self._address).port or 80
        return InputError(
            f"engine={self._address}: the vLLM server {what}; start one with "
            f"`drpo serve-rollouts {as_typed(self._model)} --port {port}`"
        )

    def _rpc(self, method: str, *args: str) -> list[Any]:
        """Call a method of the server's workers; return the result of each."""
        results = self._post("/collective_rpc", {"method": method, "args": list(args)}).get("results")
        return list(results) if isinstance(results, list) else []

    def _post(self, path: str, body: Mapping[str, Any] | None = None, most: int = MOST_BYTES) -> dict[str, Any]:
        """Send a request, and return its JSON answer of at most `most` bytes; redirects are not followed."""
        until = time.monotonic() + self._limit_s
        try:
            response = self._pool.request(
                "POST",
                self._address + path,
                json=body or {},
                headers=self._headers,
                timeout=self._limit,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            text = self._read(response, most, until).decode(errors="replace")
        except urllib3.exceptions.HTTPError as error:
            raise UnreachableError(_reason(error)) from None
        if response.status >= 500 or response.status == HTTPStatus.TOO_MANY_REQUESTS:
            raise UnreachableError(f"{path} failed with status {response.status}: {_quoted(text)}")
        if response.status != 200:
            raise self.gone(f"refused {path} with status {response.status}: {_quoted(text)}")
        try:
            answer = json.loads(text or "{}")
        except (ValueError, RecursionError):
            raise UnreachableError(
                f"{path} was answered by something that is not JSON: {_quoted(text, 80)!r}"
            ) from None
        return answer if isinstance(answer, dict) else {}


def _quoted(text: str, most: int = 200) -> str:
    """Return the beginning of a server's text in one line, without passwords and tokens."""
    return " ".join(without_secrets(text).split())[:most]


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """Return what went wrong, without urllib3's description of its own objects."""
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return "connection refused"
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return "no answer within the time limit"
    return f"{type(error).__name__}: {_quoted(str(error))}"
