"""An HTTP server with OpenAI's API, on this machine; every request needs a token.

Each connection has a thread. The threads sample in turns, a token at a time and each row by itself, so that an answer
does not depend on other requests.
"""

import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from drpo import __version__
from drpo.errors import BrokenLogpError, describe, one_line
from drpo.rollout.gate import CALLS as OF_TRAINER
from drpo.serving.fair_lock import FairLock
from drpo.serving.requests import ApiError, CompletionRequest, no_model, read_chat, read_text
from drpo.serving.responses import Response
from drpo.serving.sampler import Sampler
from drpo.serving.text import Piece

log = logging.getLogger("drpo")

MOST_BYTES = 2**20
"""Of a request's body."""
PATIENCE_S = 30.0
"""In which a request must have arrived, and the next after it; and in which a client must take what is written."""
CONNECTIONS = 64
"""Open at once; a further one is refused with status 503."""
CLOSING_S = 5.0
"""In which the threads of a server that is closed must have ended."""
AT_ONCE = 8
"""Requests that are answered at once; further ones wait. Each has keys and values of its own in memory."""
ROUTES: dict[str, Callable[[bytes, Sampler, int, str], CompletionRequest]] = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_text,
}


@dataclass(frozen=True, eq=False)
class Service:
    """The model of a server, and its settings.

    Args:
        sampler: the model.
        name: of the model, in requests and answers.
        token: required of each request, as `Authorization: Bearer TOKEN`.
        longest: default limit of a chat answer, in tokens.
        lock: held while a token is sampled; closed with the server.
        places: limit of requests that are answered at once.
        created: when the model was loaded, seconds since 1970.

    Raises:
        ValueError: there is no token.
    """

    sampler: Sampler
    name: str
    token: str
    longest: int = 512
    lock: FairLock = field(default_factory=FairLock)
    places: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(AT_ONCE))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not self.token:
            raise ValueError("a server without a token would answer everybody")

    def knows(self, authorization: str) -> bool:
        """Whether a header contains the token."""
        scheme, _, sent = authorization.partition(" ")
        known = hmac.compare_digest(sent.strip().encode("utf-8", "surrogateescape"), self.token.encode())
        return scheme.lower() == "bearer" and known

    @property
    def model(self) -> dict[str, Any]:
        """The model's entry in /v1/models."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "drpo"}

    def read(self, path: str, body: bytes) -> CompletionRequest:
        """Return the parsed request.

        Raises:
            ApiError: it names another model, or something unsupported.
        """
        with self.lock:  # a tokenizer is no thread's alone
            return ROUTES[path](body, self.sampler, self.longest, self.name)

    def answers(self, request: CompletionRequest) -> Generator[tuple[int, Piece], None, None]:
        """Yield the pieces of all answers, one answer after the other, each with the answer's number.

        The random numbers of answer i of a prompt depend on the seed and on i alone.
        """
        for at, (prompt, sampling) in enumerate(zip(request.prompts, request.sampling, strict=True)):
            for i in range(request.n):
                pieces = self.sampler.stream(prompt, sampling, ("serve", request.seed, i), request.stop)
                yield from ((at * request.n + i, piece) for piece in self.lock.taken_by(pieces))


class Server(ThreadingHTTPServer):
    """The server. It has its address from the beginning, and refuses connections until it is opened.

    Args:
        address: host and port; port 0 selects a free port.

    Raises:
        OSError: the address is taken, or cannot be used.
    """

    service: Service

    def __init__(self, address: tuple[str, int]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(address, Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError:
            self.server_close()
            raise

    def open(self, service: Service) -> None:
        """Accept connections.

        Args:
            service: the model and the settings.

        Raises:
            OSError: another server was opened at the address.
        """
        self.service = service
        self.server_activate()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a new thread, or refuse it where too many are open."""
        if len(self._connections) >= CONNECTIONS:
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self._connections[thread] = request
        try:
            thread.start()
        except RuntimeError:  # there can be no further thread
            del self._connections[thread]
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._connections[threading.current_thread()]

    def close(self) -> bool:
        """End the connections and the answers under way, each before its next token.

        Returns:
            Whether all threads have ended. Python must not be left while one is inside torch: that aborts the process.
        """
        self.server_close()
        connections = self._connections.copy()
        if connections:
            self.service.lock.close()
        for connection in connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        until = time.monotonic() + CLOSING_S
        for thread in filter(threading.Thread.is_alive, connections):
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in connections)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a broken connection, at level debug."""
        log.debug("a connection broke", exc_info=True)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"drpo/{__version__}", ""
    timeout = PATIENCE_S

    def handle_one_request(self) -> None:
        """Answer one request, within the time limit of its arrival."""
        self._arriving = threading.Timer(PATIENCE_S, self._hang_up)
        self._arriving.daemon = True
        self._arriving.start()
        try:
            super().handle_one_request()
        finally:
            self._arriving.cancel()

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer /v1/models, /v1/models/NAME and, without a token, /health."""
        service, path = self.server.service, self._path
        try:
            self._require_allowed()
        except ApiError as error:
            self._fail(error)
            return
        name = unquote(path.removeprefix("/v1/models/"))
        if path == "/health":
            self._reply(200, {"status": "ok"})
        elif path == "/v1/models":
            self._reply(200, {"object": "list", "data": [service.model]})
        elif name == service.name:
            self._reply(200, service.model)
        else:
            self._fail(no_model(name, service.name))

    def do_HEAD(self) -> None:
        """Answer as GET does, without a body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answer /v1/chat/completions and /v1/completions."""
        service, path, began = self.server.service, self._path, time.monotonic()
        try:
            self._require_allowed()
            body = self._body()
            self._arriving.cancel()
            request = service.read(path, body)
            with service.places, closing(service.answers(request)) as pieces:
                response = Response(request, service.sampler.tokenizer)
                if request.stream:
                    self._stream(response.chunks(pieces))
                else:
                    self._reply(200, response.whole(self._while_heard(pieces)))
            log.info("%s: %.1f s", path, time.monotonic() - began)
        except ApiError as error:
            self._fail(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # nobody listens
        except Exception as error:
            self._fail(_failure(error))

    @property
    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _require_allowed(self) -> None:
        """Raise unless the request's method and address are known, and its token is right.

        Raises:
            ApiError: they are not. A trainer, which sends its token in another header, is told the right server.
        """
        path, methods = self._path, _methods(self._path)
        if path in OF_TRAINER:
            raise ApiError("this server speaks OpenAI's API; the rollout server is `drpo serve-rollouts`", 404)
        if path != "/health" and not self.server.service.knows(self.headers.get("Authorization", "")):
            raise ApiError("send the token that `drpo serve` printed as the API key", 401, code="invalid_api_key")
        if not methods:
            raise ApiError("no such address; there are /v1/models, /v1/chat/completions and /v1/completions", 404)
        if self.command not in methods:
            raise ApiError(f"{one_line(path)}: there is {' and '.join(methods)} alone", 405)

    def _body(self) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: its length is missing or too large.
            ConnectionError: it is incomplete.
        """
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or "Transfer-Encoding" in self.headers:
            raise ApiError("a request must say its Content-Length", 411)
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise ApiError(f"a request has at most {MOST_BYTES:,} bytes", 413)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the request broke off")
        return body

    def _while_heard(self, pieces: Iterator[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
        """Yield pieces while the client is connected.

        Raises:
            ConnectionError: the client hung up.
        """
        for piece in pieces:
            self.connection.setblocking(False)
            try:
                if self.connection.recv(1, socket.MSG_PEEK) == b"":
                    raise ConnectionError("the client hung up")
            except BlockingIOError:
                pass  # it waits
            finally:
                self.connection.settimeout(PATIENCE_S)
            yield piece

    def _stream(self, chunks: Iterator[dict[str, Any]]) -> None:
        """Send chunks as server-sent events; the connection ends with the last."""
        self.close_connection = True
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for chunk in chunks:
                self._event(json.dumps(chunk))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # the head is sent, so the error is an event of the stream
            self._event(json.dumps(_failure(error).body))
            return
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _fail(self, error: ApiError) -> None:
        self.close_connection = True  # the rest of the request may not have been read
        self._reply(error.status, error.body)

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        if self.close_connection:
            headers["Connection"] = "close"
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(self._path))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(b"" if self.command == "HEAD" else data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Report the library's refusals, such as of a method, as an error of the API."""
        error = ApiError(message or HTTPStatus(code).phrase, code)
        try:
            if code == HTTPStatus.NOT_IMPLEMENTED:  # a method that no address has
                self._require_allowed()
        except ApiError as refusal:
            error = refusal
        self._fail(error)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing to standard error."""


def _failure(error: Exception) -> ApiError:
    """Log an error of the server, and return the API's error for it."""
    if isinstance(error, BrokenLogpError):
        return ApiError(str(error), 500)
    log.warning("a request failed: %s", describe(error))
    return ApiError("the server failed; its log says how", 500)


def _methods(path: str) -> tuple[str, ...]:
    """Return the methods that an address answers; none where there is no such address.

    Example:
        >>> _methods("/v1/models/demo"), _methods("/v1/completions"), _methods("/v1/models/")
        (('GET', 'HEAD'), ('POST',), ())
    """
    if path in ROUTES:
        return ("POST",)
    is_read = path in ("/health", "/v1/models") or path.removeprefix("/v1/models/") not in (path, "")
    return ("GET", "HEAD") if is_read else ()
