"""The command `drpo`, and `python -m drpo`: without the libraries of its extra, one line says what to install."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder, which may be a stranger's, before anything else is imported

from drpo.errors import InputError
from drpo.spec import import_named


def main() -> int:
    """Run the command; return its exit status, 2 where the objectives alone are installed."""
    try:
        return int(import_named("drpo.cli", "main", "command")())
    except InputError as error:
        print(f"drpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the command itself listens to it
        print("drpo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
