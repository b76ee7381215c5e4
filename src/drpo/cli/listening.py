"""What the servers of drpo have in common: they listen on this machine alone, and ask for a token."""

import ipaddress
import os
import secrets

from drpo.credentials import TOKEN, headers
from drpo.errors import InputError


def require_loopback(command: str, host: str, port: int, why: str) -> None:
    """Raise for an address that other machines reach: texts and weights would be sent unencrypted.

    Args:
        command: for the message.
        host: the address to listen on.
        port: the port.
        why: what the server can do, for the message.

    Raises:
        InputError: the address is none of this machine alone.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            f"{command}: --host {host}: {why}, so it listens on this machine alone; from another, come through "
            f"`ssh -N -L {port}:127.0.0.1:{port} HOST`"
        )


def require_port(command: str, port: int, least: int) -> None:
    """Raise for a number that is no port.

    Args:
        command: for the message.
        port: the number.
        least: 0 where that means any that is free; else 1.

    Raises:
        InputError: it is out of range.
    """
    if not least <= port < 2**16:
        raise InputError(f"{command}: --port {port}: must be from {least} to 65535")


def url(host: str, port: int) -> str:
    """Return the address of a server.

    Example:
        >>> url("127.0.0.1", 8000), url("::1", 8000)
        ('http://127.0.0.1:8000', 'http://[::1]:8000')
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_token() -> bool:
    """Put a token into the environment, which other users cannot read; return whether it is a new one.

    Blanks around a given token are removed: no header can send them.

    Raises:
        InputError: the environment has one that cannot be sent as a header.
    """
    if token := os.environ.get(TOKEN, "").strip():
        os.environ[TOKEN] = token
        headers()
        return False
    os.environ[TOKEN] = secrets.token_urlsafe(24)
    return True
