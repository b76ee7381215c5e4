"""A framework's settings, held to the values with which the gradient is the objective's and mu is the sampler's."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from drpo.errors import InputError

Required = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field -> its values, our default first, and what another value does."""


def check_fields(
    config: Any,
    required: Required,
    besides: Iterable[str] = (),
    setting: str = "{}={}",
    written: Callable[[Any], str] = repr,
) -> None:
    """Raise InputError for the first field whose value is not one of the required ones; absent fields pass.

    Args:
        config: anything with the fields as attributes.
        required: field -> its values and the reason.
        besides: fields that are not looked at.
        setting: how the user writes a field and its value, such as "--{} {}" or "actor.{}={}".
        written: returns a value as the user writes it.

    Example:
        >>> from types import SimpleNamespace
        >>> required = {"clip": ((False,), "it clips")}
        >>> check_fields(SimpleNamespace(clip=True), required, setting="--{} {}", written=in_yaml)
        Traceback (most recent call last):
        ...
        drpo.errors.InputError: --clip true: it clips; set --clip false
    """
    for name, (allowed, why) in required.items():
        value = getattr(config, name, allowed[0])
        if name not in besides and value not in allowed:
            known = setting.format(name, " or ".join(map(written, allowed)))
            raise InputError(f"{setting.format(name, written(value))}: {why}; set {known}")


def in_yaml(value: object) -> str:
    """Return a value as YAML and command lines have it: true, false, null, and texts without quotes."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
