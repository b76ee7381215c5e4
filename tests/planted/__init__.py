"""Bugs that the tests must notice: a module per part of the project, each with `BUGS`, run by `tests/plant_bugs.py`."""

import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """One mistake that others have made, as a patch of our source, and the tests that must fail on it.

    Args:
        number: its class in the project's table of bug classes, 1 .. 20.
        name: what is wrong, in a few words.
        file: under src/drpo.
        old: text that stands in the file exactly once.
        new: what stands there instead.
        tests: pytest node ids; a test named without its parameters fails when any of its cases does. Every one of
            these must fail on the patched source, and pass on the source as it is. Few: each start costs seconds.
    """

    number: int
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def all_bugs() -> list[Bug]:
    """Every bug of every module of this package, by number."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return sorted((bug for module in modules for bug in module.BUGS), key=lambda bug: bug.number)
