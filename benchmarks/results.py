"""The results' file: written after every case, and what an earlier run measured stays in it until measured again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.table import render
from drpo.errors import InputError

SCHEMA = 1
HARDWARE = ("processor", "cores", "accelerator")
FOLDER = Path(__file__).parent / "results"
"""Of the committed results, a file for each kind of machine."""


class Results:
    """A JSON file with a table beside it.

    Args:
        path: of the JSON file; the table has the same name with .md.
        machine: as `machine.describe` returns it.

    Raises:
        InputError: there is a file, and it is not one of ours or of another machine.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path = path
        self._machine = dict(machine)
        self._cases: dict[str, dict[str, Any]] = {}
        if path.exists():
            found = read(path, "out")
            if any(found["machine"].get(name) != self._machine[name] for name in HARDWARE):
                raise InputError(f"out={path}: holds results of another machine; give another file")
            self._cases = {_key(record): record for record in found["cases"]}

    def add(self, record: dict[str, Any]) -> None:
        """Put a case in place of what was known of it, and write both files."""
        self._cases[_key(record)] = {**record, "torch": self._machine["torch"]}
        found = {"schema": SCHEMA, "machine": self._machine, "cases": list(self._cases.values())}
        _write(self.path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        _write(self.path.with_suffix(".md"), render(found))


def _key(record: Mapping[str, Any]) -> str:
    return f"{record['part']}: {record['name']}"


def read(path: Path, option: str) -> dict[str, Any]:
    """Return what a file of results holds: "machine" and "cases".

    Args:
        path: of the JSON file.
        option: that named it, for messages.

    Raises:
        InputError: it cannot be read as results of this form.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for record in found["cases"]:
            _key(record)
        found["machine"]["processor"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{option}={path}: cannot be read as results ({error}); move it away") from None
    if found.get("schema") != SCHEMA:
        raise InputError(f"{option}={path}: holds results of another form")
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
