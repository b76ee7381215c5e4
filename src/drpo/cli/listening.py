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


def make_token() -> bool:
    """Put a token into the environment, which other users cannot read; return whether it is a new one.

    Raises:
        InputError: the environment has one that cannot be sent as a header.
    """
    if os.environ.get(TOKEN):
        headers()
        return False
    os.environ[TOKEN] = secrets.token_urlsafe(24)
    return True
