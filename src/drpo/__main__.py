"""`python -m drpo` is `drpo`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder, which may be a stranger's, before anything else is imported

from drpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
