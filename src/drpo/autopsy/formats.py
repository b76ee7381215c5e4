"""Finds a dump's files and the format of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drpo.autopsy import open_instruct, own, prime_rl, skyrl, trl, verl
from drpo.autopsy.dumped import Format
from drpo.autopsy.lines import first_keys
from drpo.autopsy.parquet import column_names
from drpo.errors import InputError, counted

FORMATS: tuple[Format, ...] = (
    verl.FORMAT,
    trl.FORMAT,
    prime_rl.EXPORT,
    prime_rl.TRACES,
    prime_rl.OLD_TRACES,
    skyrl.BATCH,
    skyrl.EVALUATION,
    open_instruct.FORMAT,
    own.JSONL,
    own.PARQUET,
)
"""In the order in which they are tried."""
SUFFIXES = tuple(sorted({f.suffix for f in FORMATS}))
KNOWN = "verl, TRL, prime-rl, SkyRL and open-instruct write, and the form of docs/autopsy.md"
MOST_FILES = 100_000
_ALIKE = 2
"""A record with so many fields of our own form is meant to have it."""


def format_of(path: Path) -> Format | None:
    """Return the format of a file; None where it is empty or unknown.

    Args:
        path: of a file; its suffix selects the parser.

    Raises:
        InputError: it is damaged.
    """
    if path.suffix == ".pkl":
        return skyrl.BATCH if skyrl.step_of(path.name) is not None else None
    keys = frozenset(column_names(path)) if path.suffix == ".parquet" else first_keys(path)
    if keys is None:
        return None
    return next((f for f in FORMATS if f.suffix == path.suffix and f.keys <= keys), None)


@dataclass(frozen=True)
class Dumps:
    """The files of a dump.

    Args:
        files: (path, format), ordered by the numbers in their names.
        left_out: files of folders that hold something else.
    """

    files: tuple[tuple[Path, Format], ...]
    left_out: tuple[Path, ...] = ()


def find_dumps(given: Sequence[Path], option: str = "") -> Dumps:
    """Find the files of a dump, in folders too, and the format of each.

    Where prime-rl wrote traces of "effective" episodes, "all", which contains them too, is not read.

    Args:
        given: files and folders.
        option: that names them, for messages.

    Raises:
        InputError: a path that is missing, a file that is no dump, or a folder without one.
    """
    found: dict[Path, Format] = {}
    left_out: list[Path] = []
    for path in given:
        if path.is_dir():
            inside, others = _looked_through(path)
            if not inside:
                raise InputError(f"{option}{path}: no rollouts in this folder; files are known that {KNOWN}")
            found |= inside
            left_out += others
            continue
        if not path.is_file():
            raise InputError(f"{option}{path}: no file there")
        kind = format_of(path) if path.suffix in SUFFIXES else None
        if kind is None:
            raise InputError(f"{option}{path}: {_why_unknown(path)}")
        found[path] = kind
    return Dumps(tuple(sorted(found.items(), key=lambda item: _by_number(item[0]))), tuple(left_out))


def _why_unknown(path: Path) -> str:
    """Return why a file is no dump: it is empty, or lacks a field of our own form, or has no known form at all."""
    keys = first_keys(path) if path.suffix == own.JSONL.suffix else frozenset()
    if keys is None:
        return "the file is empty"
    missing = sorted(own.JSONL.keys - keys)
    if len(keys & own.FIELDS) >= _ALIKE and missing:
        named = " and ".join(f"`{name}`" for name in missing)
        return f"its first record has no {named}, which our own form must have (docs/autopsy.md)"
    return f"no dump that is known: files that {KNOWN} ({', '.join(SUFFIXES)})"


def _looked_through(folder: Path) -> tuple[dict[Path, Format], list[Path]]:
    paths = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            paths.append(path)
        if len(paths) > MOST_FILES:
            raise InputError(f"{folder}: more than {counted(MOST_FILES, 'file')}; name those of one run")
    traced = [p for p in paths if not (p.parent.name == "all" and (p.parents[1] / "effective" / p.name).is_file())]
    found, others = {}, []
    for path in traced:
        try:
            kind = format_of(path)
        except InputError:
            kind = None
        if kind is None:
            others.append(path)
        else:
            found[path] = kind
    return found, others


def _by_number(path: Path) -> tuple[tuple[int, int | str], ...]:
    """Sorts step_10 after step_9."""
    parts = re.split(r"(\d+)", path.as_posix())
    return tuple((0, int(p)) if p.isdecimal() else (1, p) for p in parts)
