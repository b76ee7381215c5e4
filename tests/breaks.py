"""`drpo`, but for an engine that dies once on the last of the processes: tests/breaks.py STEP COMMAND ..."""

import os
import sys

from drpo import cli
from drpo.errors import EngineError
from drpo.rollout import TransformersEngine

draw = TransformersEngine.generate


def generate(engine: TransformersEngine, problems: object, sampling: object, seed: tuple[object, ...]) -> object:
    """Die where training draws for the step, and where an evaluation does so for `evaluation`."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if last and first and (sys.argv[1] == str(seed[0 if isinstance(seed[0], str) else 1])):
        raise EngineError("engine: it is dead")
    return draw(engine, problems, sampling, seed)  # type: ignore[arg-type]


if __name__ == "__main__":
    TransformersEngine.generate = generate  # type: ignore[assignment,method-assign]
    sys.exit(cli.main(sys.argv[2:]))
