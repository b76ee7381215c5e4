"""`drpo verify`."""

from pathlib import Path

from drpo.errors import InputError, printable
from drpo.terminal import Terminal
from drpo.train.records import CHECKPOINTS, CONFIG, FILES
from drpo.train.verify import verify as parts_of

USAGE = """usage: drpo verify RUN

See whether everything in a run's folder is what was written: configuration, records, checkpoints, evaluations, model.

  drpo verify runs/demo

A line for each part; status 0 where all is sound, 1 where something is not. Nothing is changed and no code of the
folder is run. Records after its last checkpoint have no sum yet.
"""


def verify(arguments: list[str]) -> int:
    """`drpo verify RUN`."""
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return 0
    if len(arguments) != 1:
        given = " ".join(map(repr, arguments)) or "nothing"
        raise InputError(f"verify: name the run's folder, and nothing else; got {given}")
    folder = Path(arguments[0])
    if not any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, *FILES)):
        raise InputError(f"{folder}: no run there ({CONFIG} is missing)")
    sound = True
    console = Terminal(stderr=True)
    with console.status("") as status:  # on a terminal alone, and gone with the last
        for part in parts_of(folder, lambda name: status.update(f"reading {printable(name)}")):
            sound = sound and part.sound
            print(printable(f"{'ok' if part.sound else 'WRONG':<6} {part.name:<24} {part.said}"))
    return 0 if sound else 1
