"""Ray's workers at normal priority: at its default of 15 they wait for minutes beside other work on a few cores."""

import os

os.environ.setdefault("RAY_worker_niceness", "0")
