"""Libraries that few runs need: each would cost every process of a run about a second at its start."""

import sys
from importlib.util import LazyLoader, find_spec, module_from_spec
from types import ModuleType


def lazily(name: str) -> ModuleType:
    """Return a library that is imported where an attribute of it is first asked for.

    Args:
        name: of the library, without a dot.

    Returns:
        The library, or what becomes it.

    Raises:
        ModuleNotFoundError: it is not installed.

    Example:
        >>> lazily("colorsys").rgb_to_hsv(1.0, 1.0, 1.0)
        (0.0, 0.0, 1.0)
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec.loader = LazyLoader(spec.loader)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
