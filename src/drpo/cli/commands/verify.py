"""`drpo verify`."""

from pathlib import Path

from drpo.errors import InputError, as_typed, printable
from drpo.terminal import Terminal
from drpo.train.records import CHECKPOINTS, CONFIG, FILES, TRIALS, refuse_part
from drpo.train.verify import verify as parts_of

USAGE = """usage: drpo verify RUN

Check that the files of a run are intact: configuration, records, checkpoints, evaluations, model.

  drpo verify runs/demo

Prints a line per part; the exit status is 0 if all are intact, else 1. Nothing is changed and no code of the folder is
run. Records after the last checkpoint have no checksum yet.
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
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run's")
    refuse_part(folder)
    if (folder / TRIALS).is_dir():
        each = f"drpo verify {as_typed(folder / TRIALS)}/NAME"
        raise InputError(f"{folder}: a comparison; verify its runs one by one: {each}")
    if not any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, *FILES)):
        raise InputError(f"{folder}: no run there ({CONFIG} is missing)")
    sound = True
    console = Terminal(stderr=True)
    with console.status("") as status:  # shown on a terminal only
        for part in parts_of(folder, lambda name: status.update(f"reading {printable(name)}")):
            sound = sound and part.sound
            print(printable(f"{'ok' if part.sound else 'WRONG':<6} {part.name:<24} {part.message}"))
    return 0 if sound else 1
