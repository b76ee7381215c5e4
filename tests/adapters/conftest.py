"""Ray's workers at normal priority: its default is 15, with which other work on a few cores leaves them little."""

import os

os.environ.setdefault("RAY_worker_niceness", "0")
