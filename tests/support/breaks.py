"""`drpo`, but for an engine that dies once on the last of the processes: tests/support/breaks.py STEP COMMAND ..."""

import os
import sys
from collections.abc import Sequence

from drpo import cli
from drpo.errors import EngineError
from drpo.rollout import TransformersEngine
from drpo.types import Generation, Request

draw = TransformersEngine.generate


def generate(engine: TransformersEngine, requests: Sequence[Request]) -> list[Generation]:
    """Die where training draws for the step, and where an evaluation does so for `evaluation`."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if last and first and (sys.argv[1] == str(requests[0].key[0 if isinstance(requests[0].key[0], str) else 1])):
        raise EngineError("engine: it is dead")
    return draw(engine, requests)


if __name__ == "__main__":
    TransformersEngine.generate = generate  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[2:]))
