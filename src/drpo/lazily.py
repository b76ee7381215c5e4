"""Libraries that few runs need: each would cost every process of a run about a second at its start."""

import sys
from importlib.util import LazyLoader, find_spec, module_from_spec
from types import ModuleType
from typing import NoReturn


class _Missing(ModuleType):
    """What is in the place of a library that is not installed: it raises once something of it is needed."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # of the import system and of `inspect`, which look for such on every module
            raise AttributeError(name)
        raise ModuleNotFoundError(f"No module named {self.__name__!r}", name=self.__name__)


def lazily(name: str) -> ModuleType:
    """Return a library that is imported where an attribute of it is first asked for.

    Args:
        name: of the library, without a dot.

    Returns:
        The library, or what becomes it. Where it is not installed, the first attribute raises `ModuleNotFoundError`.

    Example:
        >>> lazily("colorsys").rgb_to_hsv(1.0, 1.0, 1.0)
        (0.0, 0.0, 1.0)
        >>> lazily("no_colorsys").rgb_to_hsv(1.0, 1.0, 1.0)
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: No module named 'no_colorsys'
    """
    if (imported := sys.modules.get(name)) is not None:
        return imported
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        return _Missing(name)
    spec.loader = LazyLoader(spec.loader)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
