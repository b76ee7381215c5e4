"""Bugs that the tests must notice, run by `tests/plant_bugs.py`: a module of records per part of the project.

Each module has `REPLACEMENTS`: functions replaced while the program runs, which do not depend on how the source is
written.
"""

import importlib
import importlib.abc
import importlib.util
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NOT_PLANTED = 70
"""The exit status of a process in which a bug could not be planted."""


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
        tests: pytest node ids; a test named without its parameters fails when any of its cases does. Every one of
            these must fail where the bug is planted, and pass where it is not.
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


class _Planting(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and replaces something in it as soon as it is there."""

    def __init__(self, bug: Replacement) -> None:
        self.bug = bug

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.bug.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_plant(module: ModuleType) -> None:
            run(module)
            sys.modules.setdefault(fullname, module)
            try:
                self.bug.plant()
            except Exception as error:  # a test that fails by it would look as if it had caught the bug
                print(f"{self.bug.name!r} cannot be planted: {error!r}", file=sys.stderr, flush=True)
                os._exit(NOT_PLANTED)

        spec.loader.exec_module = run_and_plant  # type: ignore[method-assign]
        return spec


def plant_when_imported(name: str) -> None:
    """Have a bug planted as soon as its module, which is not imported yet, is."""
    bug = all_replacements()[name]
    if bug.module in sys.modules:
        raise RuntimeError(f"{bug.module} is imported already: others hold what stands in it")
    sys.meta_path.insert(0, _Planting(bug))


def all_replacements() -> dict[str, Replacement]:
    """Every replacement of every module of this package, by name.

    Raises:
        ValueError: two have the same name.
    """
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    found: list[Replacement] = [record for module in modules for record in module.REPLACEMENTS]
    twice = [name for name, n in Counter(r.name for r in found).items() if n > 1]
    if twice:
        raise ValueError(f"bugs of the same name: {twice}")
    return {replacement.name: replacement for replacement in found}
