"""One way to write an object as text: `name(1, 2, key='value')`. Parsed, never evaluated."""

import ast
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from drpo.errors import InputError, nearest

Table = Mapping[str, Callable[..., Any]]


def split_call(text: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Split `"name(1, k='x')"` into its name, positional and keyword arguments, all literals.

    Raises:
        InputError: the text is not a name or a call with literal arguments.

    Example:
        >>> split_call("ppo(0.2, 0.28, dual=3)")
        ('ppo', (0.2, 0.28), {'dual': 3})
        >>> split_call("none")
        ('none', (), {})
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        if not isinstance(call.func, ast.Name) or any(k.arg is None for k in call.keywords):
            raise ValueError
        args = tuple(ast.literal_eval(a) for a in call.args)
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"{text!r} is not of the form name or name(1, 2, key='value')") from None
    return ast.unparse(call.func), args, kwargs


def parse_call(text: str, table: Table, kind: str) -> Any:
    """Build the object that `text` spells, from a table of makers by name; see `is_maker` for what is called.

    Args:
        text: `name` or `name(arguments)`.
        table: name -> class or function that makes the object, or the plain function that *is* the object.
        kind: what the object is, for messages: "objective".

    Raises:
        InputError: unknown name (with the nearest known one), or arguments that the maker refuses.
    """
    name, args, kwargs = split_call(text)
    if name not in table:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, table)}")
    make = table[name]
    if not is_maker(make):
        if args or kwargs:
            raise InputError(f"{kind} {name!r} takes no arguments; write {name!r}")
        return make
    try:
        inspect.signature(make).bind(*args, **kwargs)
        return make(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{kind} {text!r}: {error}; it is {name}{inspect.signature(make)}") from None
    except ValueError as error:
        raise InputError(f"{kind} {text!r}: {error}") from None


def is_maker(entry: Callable[..., Any]) -> bool:
    """True for a class or a partial (calling it makes the object), False for a function, which is the object itself."""
    return isinstance(entry, type | functools.partial)


def format_call(value: Any, table: Table, kind: str) -> str:
    """Spell `value` so that `parse_call` gives an equal object back, with the arguments that are not defaults.

    Raises:
        InputError: the value is neither made by an entry of the table nor importable as `module:name`.
    """
    for name, entry in table.items():
        if value is entry:
            return name
        if isinstance(entry, type) and type(value) is entry and dataclasses.is_dataclass(value):
            return name + _arguments(value)
    return import_path(value, kind)


def _arguments(value: Any) -> str:
    """`(1, 2, key='x')`: nothing where all is default; else the first field, and by name the others that differ.

    Those that follow on the first without a gap need no name.
    """
    given = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
    differ = [default is dataclasses.MISSING or v != default for _, v, default in given]
    if not any(differ):
        return ""
    gap = next((i for i, d in enumerate(differ) if i and not d), len(given))
    shown = [repr(v) for _, v, _ in given[:gap]]
    shown += [f"{name}={v!r}" for (name, v, _), d in zip(given[gap:], differ[gap:], strict=True) if d]
    return f"({', '.join(shown)})"


def import_path(value: Any, kind: str) -> str:
    """Spell something importable as `module:name`."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and name and "<" not in name:
        return f"{module}:{name}"
    raise InputError(f"{kind} {value!r} has no name to record it by; give it one at the top level of a module")


def import_named(text: str, kind: str) -> Any:
    """Import the object that `module:name` names.

    Raises:
        InputError: the module cannot be imported or has no such name.

    Example:
        >>> import_named("math:sqrt", "reward")(9.0)
        3.0
    """
    module, _, name = text.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{kind} {text!r} cannot be imported: {error}") from None
    return value


def parse_any(text: str, table: Table, kind: str) -> Any:
    """Build what `text` spells: an entry of the table, or a user's own object as `module:name`."""
    head = text.split("(", 1)[0]
    if ":" in head:
        return import_named(text, kind)
    return parse_call(text, table, kind)
