"""Where the weights of a run come from, if they are those of another run. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from drpo.errors import InputError
from drpo.train.records import CHECKPOINTS, MODEL, read_json

ORIGIN, START = "origin.json", "start"
"""The file that says so, and the folder with those weights, in the new run's folder."""


@dataclass(frozen=True)
class Origin:
    """A point of another run.

    Args:
        run: its folder.
        step: steps that its weights had been trained.
    """

    run: str
    step: int


def read_origin(folder: Path) -> Origin | None:
    """Return where a run's weights come from; None if from no other run.

    Raises:
        InputError: origin.json cannot be read.
    """
    try:
        return msgspec.convert(read_json(folder / ORIGIN), Origin)
    except FileNotFoundError:
        return None
    except msgspec.ValidationError as error:
        raise InputError(f"{folder / ORIGIN} cannot be read: {error}".replace("`", "")) from None


def checkpoint_named(path: Path) -> tuple[Path, int]:
    """Return the run's folder and the steps of a checkpoint, from its path; 0 for the newest weights of a run.

    Raises:
        InputError: the path is that of a model.

    Example:
        >>> checkpoint_named(Path("runs/demo/checkpoints/step-000020"))[1], checkpoint_named(Path("runs/demo"))[1]
        (20, 0)
    """
    number = re.fullmatch(r"(?:step-)?(\d+)", path.name)
    if path.parent.name == CHECKPOINTS and number:
        return path.parent.parent, int(number[1])
    if path.name in (MODEL, CHECKPOINTS):
        raise InputError(f"--from {path}: name the run's folder, {path.parent}, or one of its checkpoints")
    return path, 0
