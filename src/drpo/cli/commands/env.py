"""`drpo env`: its options."""

from dataclasses import dataclass

from drpo.cli.options import parse
from drpo.spec import import_named


@dataclass(frozen=True)
class EnvOptions:
    """Print versions, hardware and settings for a bug report. No secret is printed.

      drpo env --json

    Args:
        json: print it as JSON.
    """

    json: bool = False


def env(arguments: list[str]) -> int:
    """`drpo env [--json]`."""
    options = parse(EnvOptions, arguments, "drpo env")
    return int(import_named("drpo.cli.env", "env", "command")(options))
