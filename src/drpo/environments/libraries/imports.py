"""Optional libraries."""

import dataclasses
import difflib
import importlib
import logging
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from drpo.errors import InputError, one_line
from drpo.spec import import_named


def library(name: str, task: str, install: str) -> ModuleType:
    """Import an optional library, which does not get to configure this process's logging.

    Args:
        name: of its module.
        task: that needs it, for the message.
        install: arguments of pip.

    Raises:
        InputError: it cannot be imported.

    Example:
        >>> library("no_gym", "gym('x')", "no-gym")
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: gym('x') needs no_gym: No module named 'no_gym'; run pip install no-gym
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library may raise anything as it is imported
        raise InputError(f"{task} needs {name}: {one_line(error)}; run pip install {install}") from None
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def require_turns(task: str, turns: int) -> None:
    """Raise unless a limit of turns is in its range.

    Raises:
        InputError: it is not.
    """
    if type(turns) is not int or not 1 <= turns <= 1024:
        raise InputError(f"{task}: turns={turns!r} must be an integer from 1 to 1024")


def made_anew(task: Any) -> tuple[type[Any], tuple[Any, ...]]:
    """Return what `__reduce__` of a task returns, a dataclass, so that it is unpickled by its constructor."""
    return type(task), tuple(getattr(task, f.name) for f in dataclasses.fields(task))


def environment_class(spec: str, task: str) -> type[Any]:
    """Import the class of an environment by its `module:Class`.

    Raises:
        InputError: it cannot be imported or is no class.

    Example:
        >>> environment_class("fractions:Fraction", "trl_environment")
        <class 'fractions.Fraction'>
    """
    module, colon, name = spec.partition(":")
    found = import_named(module, name, task) if colon else None
    if not isinstance(found, type):
        raise InputError(f"{task}: environment={spec!r} must name a class, as 'module:Class'")
    return found


def suggestion(name: str, known: Iterable[str], listing: str) -> str:
    """Return what to write in place of an unknown name: the nearest known one, or how to list them, which are many.

    Example:
        >>> suggestion("Ches-v0", ["Chess-v0"], "games()"), suggestion("Go", ["Chess-v0"], "games()")
        ("; did you mean 'Chess-v0'?", '; games() lists those that there are')
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; {listing} lists those that there are"
