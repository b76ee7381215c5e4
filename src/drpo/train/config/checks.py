"""Checks of a configuration's fields, whose messages name field, value and rule."""

from collections.abc import Sequence
from inspect import getattr_static

from drpo.errors import InputError, nearest
from drpo.spec import Unimported


def require(fine: bool, name: str, value: object, rule: str) -> None:
    """Raise unless a field's value is fine.

    Raises:
        InputError: it is not; the message names field, value and rule.
    """
    if not fine:
        raise InputError(f"{name}={value}: {rule}")


def require_task(**tasks: object) -> None:
    """Raise unless each of some fields holds a task, or the placeholder of one."""
    require_parts("a task", ("sample", "held_out", "reward"), **tasks)


def require_parts(kind: str, parts: Sequence[str], **values: object) -> None:
    """Raise unless each of some fields holds an object with these attributes, or the placeholder of one."""
    for name, value in values.items():
        # Statically: a task's reward may import a library.
        missing = next((part for part in parts if getattr_static(value, part, None) is None), None)
        rule = f"must be {kind} with {' and '.join(f'`{part}`' for part in parts)}; this has no `{missing}`"
        require(missing is None or isinstance(value, Unimported), name, name_of(value), rule)
        require(not isinstance(value, type), name, name_of(value), "is a class; pass an instance of it")


def name_of(value: object) -> object:
    """Return the name of a class or function, for a message; anything else as it is."""
    return getattr(value, "__name__", value)


def at_least(least: int, **values: int) -> None:
    """Raise unless each of some numbers is at least `least`."""
    for name, value in values.items():
        require(value >= least, name, value, f"must be at least {least}" if least else "must be 0 or more")


def at_most(most: int, **values: int) -> None:
    """Raise unless each of some numbers is at most `most`."""
    for name, value in values.items():
        require(value <= most, name, value, f"at most {most:,}")


def one_of(known: tuple[str, ...], **values: str) -> None:
    """Raise unless each of some words is known; the nearest known one is named."""
    for name, value in values.items():
        if value not in known:
            raise InputError(f"{name}={value!r}{nearest(value, known)}")
