"""`python -m drpo` is `drpo`."""

import sys

from drpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
