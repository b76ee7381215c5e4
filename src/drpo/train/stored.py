"""The contents of a checkpoint's folder, and their checksums. No torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from drpo.errors import InputError
from drpo.files import write_text
from drpo.train import curriculum
from drpo.train.records import Written, parse_json

WEIGHTS, OPTIMIZER, STATE, SUMS = "weights.safetensors", "optimizer.safetensors", "state.json", "sha256"
CURRICULUM = "curriculum.json"
"""What a curriculum knows of its problems, and what it chose ahead: a file of a checkpoint."""


SHA256SUMS = "SHA256SUMS"
"""The file in a model's folder with the checksums of the others."""


@dataclass(frozen=True)
class Progress:
    """A run's progress at a checkpoint.

    Args:
        step: rollouts trained on; also the cursor into the task's problems and every random stream's position.
        updates: optimiser updates done.
        tokens: sampled so far.
        skipped, critic_skipped: updates in a row, up to the last, that were not made.
        records: of each file of records, the length and SHA-256 it had; empty in a checkpoint of an earlier version.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    skipped: int = 0
    critic_skipped: int = 0
    records: dict[str, Written] = field(default_factory=dict)


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a run's checkpoint folder, or None."""
    checkpoints = complete(folder)
    return checkpoints[-1] if checkpoints else None


def steps(folder: Path) -> dict[int, Path]:
    """Return every complete checkpoint in a run's checkpoint folder, by its step, the oldest first."""
    return {step_of(path): path for path in complete(folder)}


def require_sound(checkpoint: Path) -> None:
    """Raise unless every file of a checkpoint matches its checksum.

    Raises:
        InputError: a file is missing, or its checksum differs.
    """
    _, state_sum, sums = read_state(checkpoint)
    for name, wanted in sums.items():
        path = checkpoint / name
        if not path.is_file():
            raise InputError(f"checkpoint {path}: missing")
        if wanted != (state_sum if name == STATE else sum_of(path)):
            raise InputError(f"checkpoint {path}: damaged, its SHA-256 is not what was written with it")


def read_state(checkpoint: Path) -> tuple[Progress, str, dict[str, str]]:
    """Where the run stood, that record's fingerprint, and file -> checksum; an earlier version wrote none, or more."""
    try:
        record = parse_json((checkpoint / STATE).read_bytes())
        sums = msgspec.convert(record.pop(SUMS, {}), dict[str, str])
        return msgspec.convert(record, Progress), fingerprint(record), sums
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: it is no object
        raise InputError(f"checkpoint {checkpoint / STATE} cannot be read: {error}") from None


def read_curriculum(checkpoint: Path) -> curriculum.State | None:
    """Return the state of the curriculum in a checkpoint, or None where there was none.

    Raises:
        InputError: it cannot be read.
    """
    path = checkpoint / CURRICULUM
    try:
        return msgspec.json.decode(path.read_bytes(), type=curriculum.State) if path.exists() else None
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        raise InputError(f"{path} cannot be read: {error}".replace("`", "")) from None


def fingerprint(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of state.json without its checksums."""
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def sum_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder into it, as `sha256sum --check` reads them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SHA256SUMS)
    write_text(folder / SHA256SUMS, "".join(f"{sum_of(path)}  {path.name}\n" for path in files))


def complete(folder: Path) -> list[Path]:
    """Return every complete checkpoint in a run's checkpoint folder, the oldest first."""
    return [path for path in named(folder) if (path / STATE).is_file()]


def named(folder: Path) -> list[Path]:
    """Return all folders with a checkpoint's name, complete or not, the oldest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))
