"""Bugs that the tests must notice, run by `tests/plant_bugs.py`: a module per part of the project.

Each module has `BUGS`, patches of the source, or `REPLACEMENTS`, functions replaced while the program runs. The latter
do not depend on how the source is written, so they are the ones to add.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any


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


@dataclass(frozen=True)
class Replacement:
    """One mistake, as a function that takes the place of a right one as soon as its module is imported.

    It holds in the process that runs the tests and in every Python process that they start without `-I` or `-S`.

    Args:
        name: what is wrong, in a few words; unique.
        target: `package.module:attribute` or `package.module:Class.attribute`; a function, method, class or constant.
        make: receives what stands there and returns the wrong one. A static method, class method or property is
            unwrapped before and wrapped again after. Import `drpo` inside `make` or its result, never at the top of the
            module of records: the target is not imported yet.
        tests: as for `Bug`.
    """

    name: str
    target: str
    make: Callable[[Any], Any]
    tests: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module to replace something in."""
        return self.target.partition(":")[0]

    def plant(self) -> None:
        """Replace the target, in its module, which is imported.

        Raises:
            AttributeError: there is no such target.
        """
        *path, last = self.target.partition(":")[2].split(".")
        owner = reduce(getattr, path, importlib.import_module(self.module))
        original = vars(owner)[last] if last in vars(owner) else getattr(owner, last)
        match original:
            case staticmethod() | classmethod():
                wrong = type(original)(self.make(original.__func__))
            case property():
                wrong = property(self.make(original.fget))
            case _:
                wrong = self.make(original)
        setattr(owner, last, wrong)


def _records(kind: str) -> list[Any]:
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return [record for module in modules for record in getattr(module, kind, ())]


def all_bugs() -> list[Bug]:
    """Every patch of every module of this package, by number."""
    return sorted(_records("BUGS"), key=lambda bug: bug.number)


def all_replacements() -> dict[str, Replacement]:
    """Every replacement of every module of this package, by name."""
    return {replacement.name: replacement for replacement in _records("REPLACEMENTS")}
