"""The secrets for a rollout server; they come from the environment and are never recorded."""

import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from drpo.errors import InputError, one_line

TOKEN = "DRPO_SERVER_TOKEN"
"""Environment variable: the token that `drpo serve-rollouts` requires."""
AUTH = "DRPO_SERVER_AUTH"
"""Environment variable: user:password, for a proxy in front of the server."""
HEADER = "drpo-token"
"""Header of the token; `Authorization` is left to the proxy."""

_USER = re.compile(r"(https?://)((?:(?!,https?://).)*)@", re.IGNORECASE | re.DOTALL)
"""A password may contain unquoted commas, spaces, slashes and @."""
_MISSPELT = re.compile(r"^(--engine=)?.*@", re.DOTALL)
"""The part before the host of an address without http://; such an address is rejected with a message."""


def without_password(text: str) -> str:
    """Remove user and password from every address in a text.

    Example:
        >>> without_password("--engine=http://me:secret@host:8000,http://other:8000")
        '--engine=http://host:8000,http://other:8000'
    """
    return _USER.sub(r"\1", text)


def keep_password(arguments: Sequence[str]) -> list[str]:
    """Move the password of a command's `--engine` into the environment, where `headers` reads it.

    Child processes inherit it; no record of the run contains it.

    Args:
        arguments: of the command.

    Returns:
        The arguments, with addresses without user and password.

    Raises:
        InputError: the servers have different passwords.
    """
    engines = [i for i, a in enumerate(arguments) if a.startswith("--engine=") or arguments[i - 1 : i] == ["--engine"]]
    users = {match[2] for i in engines for match in _USER.finditer(arguments[i])}
    if len(users) > 1:
        raise InputError("--engine: servers with different passwords; give all of them the same")
    if users:
        os.environ[AUTH] = unquote(users.pop())
    return [_MISSPELT.sub(r"\1", without_password(a)) if i in engines else a for i, a in enumerate(arguments)]


def without_secrets(text: str) -> str:
    """Return what a server said with the token and the password that it was sent left out: some echo a request.

    Example:
        >>> os.environ[TOKEN] = "abcd"
        >>> without_secrets("403: drpo-token: abcd")
        '403: drpo-token: ***'
        >>> del os.environ[TOKEN]
    """
    token, auth = os.environ.get(TOKEN, ""), os.environ.get(AUTH, "")
    for secret in filter(None, (token, b64encode(auth.encode()).decode(), auth, auth.partition(":")[2])):
        text = text.replace(secret, "***")
    return text


def shown(message: str) -> str:
    """Return a message for people as one printable line, without the passwords of addresses.

    Example:
        >>> shown("http://me:secret@host/v1:\\n refused")
        'http://host/v1: refused'
    """
    return one_line(" ".join(map(without_password, message.split(" "))))


def headers() -> Mapping[str, str]:
    """Return the authentication headers of a request.

    Raises:
        InputError: a variable contains characters that a header cannot.
    """
    token, auth = os.environ.get(TOKEN, ""), os.environ.get(AUTH, "")
    if not (token.isascii() and token.isprintable()):
        raise InputError(f"{TOKEN}: must be plain printable characters, as `drpo serve-rollouts` printed them")
    known = {HEADER: token} if token else {}
    return known | ({"authorization": f"Basic {b64encode(auth.encode()).decode()}"} if auth else {})
