"""The results' file: written after every case, and what an earlier run measured stays in it until measured again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.table import render
from drpo.errors import InputError

SCHEMA = 1


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
            for record in _read(path, self._machine):
                self._cases[_key(record)] = record

    def add(self, record: dict[str, Any]) -> None:
        """Put a case in place of what was known of it, and write both files."""
        self._cases[_key(record)] = {**record, "torch": self._machine["torch"]}
        found = {"schema": SCHEMA, "machine": self._machine, "cases": list(self._cases.values())}
        _write(self.path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        _write(self.path.with_suffix(".md"), render(found))


def _key(record: Mapping[str, Any]) -> str:
    return f"{record['part']}: {record['name']}"


def _read(path: Path, machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        cases: list[dict[str, Any]] = found["cases"]
        there, same = found["machine"], found["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"out={path}: cannot be read as results ({error}); move it away") from None
    hardware = ("processor", "cores", "accelerator")
    if not same or any(there.get(name) != machine[name] for name in hardware):
        raise InputError(f"out={path}: holds results of another machine or an older form; give another file")
    return cases


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
