"""Checks of an objective's parameters at construction; errors name the parameter."""

import math

from drpo.errors import InputError


def require(name: str, value: float, *, above: float, below: float = math.inf, closed: bool = False) -> None:
    """Raise unless `value` is a finite number inside (above, below), or [above, below] where `closed`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and (above <= value <= below if closed else above < value < below)
    if not inside:
        left, right = ("[", "]") if closed else ("(", ")")
        raise InputError(f"{name}={value!r} must be a finite number in {left}{above}, {below}{right}")


def require_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `known`."""
    if value not in known:
        raise InputError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
