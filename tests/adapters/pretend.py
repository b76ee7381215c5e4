"""Adapters imported on stand-ins: modules made up for a test, under a framework's names."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest


@contextlib.contextmanager
def imported_on(adapter: str, modules: Mapping[str, Mapping[str, Any]]) -> Iterator[ModuleType]:
    """The module of an adapter, imported anew while modules of these names and contents are all there is of them.

    Args:
        adapter: the module's name, "drpo.adapters.NAME".
        modules: full name -> what is in it; the packages around them are made too.
    """
    with pytest.MonkeyPatch.context() as patch:
        for full in modules:
            names = full.split(".")
            for i in range(1, len(names) + 1):
                name = ".".join(names[:i])
                if not isinstance(sys.modules.get(name), Pretended):
                    patch.setitem(sys.modules, name, Pretended(name))
                if i > 1:
                    setattr(sys.modules[".".join(names[: i - 1])], names[i - 1], sys.modules[name])
            vars(sys.modules[full]).update(modules[full])
        patch.delitem(sys.modules, adapter, raising=False)
        yield importlib.import_module(adapter)
        sys.modules.pop(adapter, None)


class Pretended(ModuleType):
    """A module that is made up."""

    __path__: tuple = ()
