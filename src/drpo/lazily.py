"""Libraries and modules that few runs need: each would cost every process of a run about a second at its start."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """A library that is imported where something of it is first asked for.

    It is not in `sys.modules`: torch calls `inspect` as it is imported, which looks for `__file__` on everything there
    and would import the library.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(import_module(self.__name__), name)


def lazily(name: str) -> ModuleType:
    """Return a library or module that is imported where an attribute of it is first asked for.

    Args:
        name: of the library or module, in full.

    Returns:
        The library, or what stands for it. Where it is not installed, the first attribute raises `ModuleNotFoundError`.

    Example:
        >>> lazily("colorsys").rgb_to_hsv(1.0, 1.0, 1.0)
        (0.0, 0.0, 1.0)
        >>> lazily("no_colorsys").rgb_to_hsv(1.0, 1.0, 1.0)
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: No module named 'no_colorsys'
    """
    return sys.modules.get(name) or _Later(name)
