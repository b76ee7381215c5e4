"""Asks a service over HTTP for scores: bounded in time and size, retried, remembered and counted."""

import asyncio
import email.utils
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakKeyDictionary

import httpx2

from drpo.credentials import without_password
from drpo.errors import InputError, describe, one_line
from drpo.rewards.contract import ScoreError
from drpo.rewards.usage import count
from drpo.types.problem import is_reward, not_a_reward

MOST_BYTES = 2**20
"""Of an answer."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Pauses between attempts double from the first on, up to the longest; a server's Retry-After may be longer."""
_POOL_GRACE_S = 5.0
_REMEMBERED = 100_000
_SHARE = 16
_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that a later attempt may not have."""
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SECRET = re.compile(r"(?:^|[-_])(?:key|token|secret|password|passwd|auth|sig|signature|code)$|apikey$", re.IGNORECASE)
"""Names of an address's parameters that hold a secret."""

Answer: TypeAlias = Mapping[str, Any]


def _reachable(url: str) -> bool:
    """Whether an address has a host, and a port below 65536 or none."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, a bracket of IPv6 that is not closed
        return False


@dataclass(frozen=True)
class Endpoint:
    """Where a service is, and how patiently it is asked.

    Args:
        url: http://host:port/path or https://...
        key: name of the environment variable that holds the key, sent as `Authorization: Bearer`; "" sends none.
        seconds: longest time of a score, retries included, > 0; one attempt has half of it.
        retries: further attempts after a failure that may pass: no connection, no answer, status 429 or from 500 on.

    Raises:
        InputError: a value out of its range, or a password or a key in the address.
    """

    url: str
    key: str = ""
    seconds: float = 60.0
    retries: int = 3

    def __post_init__(self) -> None:
        bare = without_password(str(self.url))
        if bare != self.url:
            raise InputError(
                f"url={bare!r}: its password would be recorded; key='NAME' sends what that environment variable holds"
            )
        if re.search(r"\s", bare) or not _reachable(bare):
            raise InputError(f"url={bare!r}: must be http://host:port/path")
        secret = next((name for name, _ in parse_qsl(urlsplit(bare).query) if _SECRET.search(name)), None)
        if secret is not None:
            raise InputError(
                f"url: its parameter {one_line(secret)!r} would be recorded; key='NAME' sends what that environment "
                "variable holds, as Authorization: Bearer"
            )
        if self.key and not _VARIABLE.fullmatch(self.key):
            raise InputError("key: must be the name of an environment variable, in capital letters, not the key itself")
        if not 0 < self.seconds <= 3600:
            raise InputError(f"seconds={self.seconds}: must be above 0 and at most 3600")
        if not 0 <= self.retries <= 20:
            raise InputError(f"retries={self.retries}: must be from 0 to 20")

    @property
    def longest_seconds(self) -> float:
        """What a reward pool has to allow for a score."""
        return self.seconds + _POOL_GRACE_S

    @property
    def shown(self) -> str:
        """The address for messages, without its query."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    def headers(self) -> dict[str, str]:
        """Return the headers of a request.

        Raises:
            InputError: the key's environment variable is not set, or holds what a header cannot.
        """
        value = os.environ.get(self.key, "") if self.key else ""
        if self.key and not (value and value.isascii() and value.isprintable()):
            raise InputError(f"key={self.key!r}: set this environment variable to the key of {self.shown}")
        known = {"authorization": f"Bearer {value}"} if value else {}
        return {"content-type": "application/json", "accept-encoding": "identity", "user-agent": "drpo", **known}

    async def score(self, body: Mapping[str, Any], read: Callable[[Answer], float]) -> float:
        """Return the score that the service gives; equal requests of a process are sent once.

        Args:
            body: the request, for JSON.
            read: returns the score of an answer; raises `ScoreError` if it has none.

        Raises:
            ScoreError: there is no score; the text says why.
        """
        content = json.dumps(body, ensure_ascii=False, default=str).encode("utf-8", "replace")
        name = hashlib.sha256(self.url.encode() + b"\0" + content).digest()
        service = _service()
        if (known := service.scores.get(name)) is not None:
            score = await asyncio.shield(known)
            count("cached")
            return score
        service.scores[name] = future = asyncio.get_running_loop().create_future()
        count("calls")
        start = time.monotonic()
        try:
            score = read(await self._answer(service.client, content))
        except BaseException as error:
            count("failed")
            del service.scores[name]  # asked again, should the text come again
            future.set_exception(error if isinstance(error, ScoreError) else ScoreError("raised", describe(error)))
            future.exception()  # seen, should nobody wait for it
            raise
        finally:
            count("seconds", time.monotonic() - start)
        future.set_result(score)
        if len(service.scores) > _REMEMBERED:
            service.forget()
        return score

    async def _answer(self, client: httpx2.AsyncClient, content: bytes) -> Answer:
        last = "no answer"
        try:
            async with asyncio.timeout(self.seconds) as limit:
                for attempt in range(self.retries + 1):
                    if attempt:
                        count("retries")
                    try:
                        return await self._attempt(client, content)
                    except _AgainError as again:
                        last = str(again)
                        if attempt == self.retries:
                            break
                        self._require_time(again, limit)
                        pause = max(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S), again.wait_s)
                    await asyncio.sleep(pause)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ScoreError("timed_out", f"{self.shown}: no score within {self.seconds:g} s ({last})") from None
        raise ScoreError("raised", f"{self.shown}: failed {self.retries + 1} times ({last})")

    def _require_time(self, again: "_AgainError", limit: asyncio.Timeout) -> None:
        """Raise if a service asks for a longer wait than the time that is left of a score."""
        ends = limit.when()
        assert ends is not None
        left = ends - asyncio.get_running_loop().time()
        if again.wait_s >= left:
            wait = f"asks to wait {again.wait_s:,.0f} s (Retry-After)"
            rest = f"{left:.1f} s of seconds={self.seconds:g} are left"
            advice = "allow more seconds, or fewer calls at once (concurrency)"
            raise ScoreError("timed_out", f"{self.shown}: {wait}, and {rest}; {advice} ({again})")

    async def _attempt(self, client: httpx2.AsyncClient, content: bytes) -> Answer:
        try:
            async with asyncio.timeout(self.seconds / 2) as limit:
                status, wait_s, text = await self._send(client, content)
        except TimeoutError:
            if not limit.expired():
                raise
            raise _AgainError(f"no answer within {self.seconds / 2:g} s") from None
        except httpx2.TransportError as error:
            raise _AgainError(self._quoted(describe(error))) from None
        if status in _AGAIN or status >= 500:
            raise _AgainError(f"status {status}: {self._quoted(text)}", wait_s)
        if not 200 <= status < 300:
            raise ScoreError("raised", f"{self.shown}: refused with status {status}: {self._quoted(text)}")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            raise ScoreError("not_a_number", f"{self.shown}: the answer is not JSON: {self._quoted(text)}") from None
        if not isinstance(answer, dict):
            raise ScoreError("not_a_number", f"{self.shown}: the answer is no JSON object: {self._quoted(text)}")
        return answer

    async def _send(self, client: httpx2.AsyncClient, content: bytes) -> tuple[int, float, str]:
        """Return an answer's status, the seconds that it asks to wait, and its text."""
        body = bytearray()
        async with client.stream("POST", self.url, content=content, headers=self.headers()) as response:
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MOST_BYTES:
                    raise ScoreError("raised", f"{self.shown}: an answer of more than {MOST_BYTES:,} bytes")
            return (
                response.status_code,
                _seconds_to_wait(response.headers.get("retry-after")),
                body.decode(errors="replace"),
            )

    def _quoted(self, text: str) -> str:
        """Return the beginning of a server's text, without the key that it was sent."""
        value = os.environ.get(self.key, "") if self.key else ""
        return one_line(text[:2000].replace(value, "***") if value else text[:2000])[:100]


class _AgainError(Exception):
    """A failure that a later attempt may not have."""

    def __init__(self, text: str, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class _Service:
    """An event loop's connections, and the scores that it knows or waits for."""

    def __init__(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=_SHARE)
        trusted = httpx2.create_ssl_context()
        # A client looks through all its connections at each request, so each has a share of them.
        self._clients = cycle([httpx2.AsyncClient(verify=trusted, timeout=None, limits=limits) for _ in range(_SHARE)])
        self.scores: dict[bytes, asyncio.Future[float]] = {}

    @property
    def client(self) -> httpx2.AsyncClient:
        """The client whose turn it is."""
        return next(self._clients)

    def forget(self) -> None:
        """Drop the older half of the scores that are known."""
        for name in [name for name, future in self.scores.items() if future.done()][: _REMEMBERED // 2]:
            del self.scores[name]


_SERVICES: "WeakKeyDictionary[asyncio.AbstractEventLoop, _Service]" = WeakKeyDictionary()


def _service() -> _Service:
    loop = asyncio.get_running_loop()
    if loop not in _SERVICES:
        _SERVICES[loop] = _Service()
    return _SERVICES[loop]


def _seconds_to_wait(header: str | None) -> float:
    """Return what Retry-After asks for, in seconds or as a date; 0 where it is absent or unreadable."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header)) if header.strip().isdigit() else _until(header)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _until(date: str) -> float:
    return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - time.time())


def number(value: Any, name: str) -> float:
    """Return a number of an answer.

    Raises:
        ScoreError: it is none (text, null, true, a list), or not finite.

    Example:
        >>> number(1, "score")
        1.0
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = f"{one_line(repr(value)[:60])} ({type(value).__name__})"
        raise ScoreError("not_a_number", f"{name} is {shown}, not a number")
    score = math.inf if abs(value) >= 1e300 else float(value)
    if not is_reward(score):
        raise ScoreError("not_finite", f"{name} is {not_a_reward(score)}")
    return score
