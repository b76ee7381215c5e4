"""Access control of `drpo serve-rollouts`: requires a token, and allows only the calls that drpo makes.

vLLM's API key guards `/v1` alone, not the calls that replace weights or run a worker's method. So an ASGI middleware
(vLLM's `--middleware`) checks every request before vLLM handles it.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from drpo.credentials import HEADER, TOKEN

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

RPC = "/collective_rpc"
CALLS = frozenset({RPC, "/reset_prefix_cache", "/update_weight_version", "/inference/v1/generate"})
"""All calls that `ServerEngine` makes."""
OPEN = "/health"
"""The health check, allowed without a token."""
METHODS = frozenset({"drpo_dtype", "drpo_load_file"})
"""The workers' methods that may be called."""
_MOST_BYTES = 2**16
"""Upper bound of the body of an RPC call, which holds a method's name and a path."""


class Gate:
    """The ASGI middleware.

    Args:
        app: the application behind the gate.

    Raises:
        KeyError: the environment holds no token, so the server must not start.
    """

    def __init__(self, app: App) -> None:
        self._app, self._token = app, os.environ[TOKEN].encode("ascii")
        if not self._token:
            raise KeyError(TOKEN)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forward a request, or respond with 401 (wrong token) or 403 (call not allowed)."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == OPEN):
            await self._app(scope, receive, send)
            return
        token = dict(scope["headers"]).get(HEADER.encode("ascii"), b"")
        if not hmac.compare_digest(token, self._token):
            await _refuse(scope, send, 401, f"set {TOKEN} to the token that `drpo serve-rollouts` printed")
        elif scope["type"] != "http" or scope["path"] not in CALLS:
            await _refuse(scope, send, 403, "not a call that drpo makes")
        elif scope["path"] != RPC:
            await self._app(scope, receive, send)
        else:
            body = await _body(receive)
            if _method(body) in METHODS:
                await self._app(scope, _again(body, receive), send)
            else:
                await _refuse(scope, send, 403, f"not a method that may be called; known: {', '.join(sorted(METHODS))}")


async def _body(receive: Receive) -> bytes:
    """Return the whole body, or more than `_MOST_BYTES` of it."""
    body, more = b"", True
    while more and len(body) <= _MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _method(body: bytes) -> str:
    """Return the method that an RPC body names, "" if it names none."""
    try:
        record = json.loads(body) if len(body) <= _MOST_BYTES else {}
        return str(record["method"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that replays a body that was already read."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


async def _refuse(scope: Message, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    head = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": json.dumps({"error": why}).encode()})
