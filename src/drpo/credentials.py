"""The secret that a rollout server requires of its callers; it comes from the environment and is recorded nowhere."""

import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from drpo.errors import InputError

TOKEN = "DRPO_SERVER_TOKEN"
"""Environment variable: the token that `drpo serve` asks for."""
AUTH = "DRPO_SERVER_AUTH"
"""Environment variable: user:password, for a proxy before the server that asks for them."""
HEADER = "drpo-token"
"""The token's; `Authorization` stays free for the proxy."""

_USER = re.compile(r"(https?://)((?:(?!,https?://).)*)@", re.IGNORECASE | re.DOTALL)
"""A password may hold what should have been quoted: commas, spaces, slashes, other @."""
_MISSPELT = re.compile(r"^(--engine=)?.*@", re.DOTALL)
"""What stands before the host of an address without http://, which is refused, and said."""


def without_password(text: str) -> str:
    """Return a text with the user and the password of every address in it left out.

    Example:
        >>> without_password("--engine=http://me:secret@host:8000,http://other:8000")
        '--engine=http://host:8000,http://other:8000'
    """
    return _USER.sub(r"\1", text)


def keep_password(arguments: Sequence[str]) -> list[str]:
    """Take the password out of a command's `--engine` and into the environment, where `headers` finds it.

    Processes that the command starts find it too, and no record of the run does.

    Args:
        arguments: of the command.

    Returns:
        The same arguments, their addresses without user and password.

    Raises:
        InputError: the servers have different ones.
    """
    engines = [i for i, a in enumerate(arguments) if a.startswith("--engine=") or arguments[i - 1 : i] == ["--engine"]]
    found = {match[2] for i in engines for match in _USER.finditer(arguments[i])}
    if len(found) > 1:
        raise InputError("--engine: servers with different passwords; give all of them the same")
    if found:
        os.environ[AUTH] = unquote(found.pop())
    return [_MISSPELT.sub(r"\1", without_password(a)) if i in engines else a for i, a in enumerate(arguments)]


def headers() -> Mapping[str, str]:
    """Return the headers of a request that say who asks.

    Raises:
        InputError: a variable holds what no header can.
    """
    token, auth = os.environ.get(TOKEN, ""), os.environ.get(AUTH, "")
    if not (token.isascii() and token.isprintable()):
        raise InputError(f"{TOKEN}: must be plain printable characters, as `drpo serve` printed them")
    known = {HEADER: token} if token else {}
    return known | ({"authorization": f"Basic {b64encode(auth.encode()).decode()}"} if auth else {})
