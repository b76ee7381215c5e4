"""How a run's configuration is written down and read back: config.json has an object for each group.

Objects are written as their specs. Messages about a configuration name a field by its path, `evaluation.every`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from drpo import environments, methods, objectives, reductions, rewards, tasks
from drpo.credit import advantages, gae, overlong
from drpo.errors import InputError, as_typed, nearest
from drpo.spec import Registry, Unimported, contacts, format_spec, parse_spec, runs_code
from drpo.train import best_of, curriculum, optim
from drpo.train.config.checks import require
from drpo.train.config.run import Run
from drpo.train.fields import FIELDS
from drpo.train.records import CONFIG, SFT, read_config

Record = TypeVar("Record")

OFF = "inf"
"""In place of an infinite max_grad_norm, which JSON has no number for."""
_LARGEST = 2**63 - 1

REGISTRIES: Mapping[str, Registry[Any]] = {
    "warm_up": best_of.REGISTRY,
    "task": tasks.REGISTRY,
    "eval_task": tasks.REGISTRY,
    "environment": environments.REGISTRY,
    "curriculum": curriculum.REGISTRY,
    "reward": rewards.REGISTRY,
    "overlong": overlong.REGISTRY,
    "objective": objectives.REGISTRY,
    "advantage": advantages.REGISTRY,
    "critic": gae.REGISTRY,
    "reduction": reductions.REGISTRY,
    "optimizer": optim.OPTIMIZERS,
    "critic_optimizer": optim.OPTIMIZERS,
    "schedule": optim.SCHEDULES,
}
"""Options whose fields hold objects, which are written as specs."""
_REGISTRY_AT = {FIELDS[name]: registry for name, registry in REGISTRIES.items()}


def to_json(run: Any) -> dict[str, Any]:
    """Return a run's configuration as plain JSON values, an object for each group; `from_json` gives an equal run back.

    Args:
        run: a `Run`, or another record of the same groups, which `read_record` gives back.

    Example:
        >>> to_json(Run())["checkpoints"]
        {'every': 20, 'keep': 2}
    """
    plain: dict[str, Any] = json.loads(json.dumps(_plain(run, "")))
    return plain


def _plain(value: Any, path: str) -> Any:
    if path in _REGISTRY_AT:
        return None if value is None else format_spec(value, _REGISTRY_AT[path])
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), _within(path, f.name)) for f in fields(value)}
    return OFF if value == math.inf else value


def flat_json(run: Run) -> dict[str, Any]:
    """Return the same values by the names of their options.

    Example:
        >>> flat_json(Run())["checkpoint_every"], flat_json(Run())["sampling.samples"]
        (20, 8)
    """
    record = to_json(run)
    return {name: reduce(getitem, path.split("."), record) for name, path in FIELDS.items() if name != "learning_rate"}


def from_json(record: Mapping[str, Any], trust_remote_code: bool = True) -> Run:
    """Build a run from what `to_json` wrote.

    Args:
        record: by group and field; those that are left out have their defaults.
        trust_remote_code: import the fields whose spec is `module:name`, and let rewards have addresses; False puts an
            `Unimported` in their place, which keeps the spec and can do nothing.

    Raises:
        InputError: an unknown field, or a value that a field refuses; the message names its path.
    """
    run: Run = _record(record, Run, "", trust_remote_code)
    return run


def read_record(record: Mapping[str, Any], kind: type[Record], trust_remote_code: bool = True) -> Record:
    """Build a record of a run's groups, such as `SFTConfig`, from what `to_json` wrote.

    Args:
        record: by group and field.
        kind: of the record.
        trust_remote_code: as for `from_json`.

    Raises:
        InputError: as `from_json`.
    """
    built: Record = _record(record, kind, "", trust_remote_code)
    return built


def read_value(name: str, value: Any) -> Any:
    """Return what the field of an option holds, from a plain value as the command line or JSON has it.

    Raises:
        InputError: a value of another type, or a spec that cannot be read; the message names the option's field.

    Example:
        >>> read_value("objective", "drpo(0.1)").delta, read_value("eval_every", 2)
        (0.1, 2)
    """
    return _read(value, kind_of(FIELDS[name]), FIELDS[name], name, True)


def kind_of(path: str) -> Any:
    """Return the type of a run's field.

    Example:
        >>> kind_of("evaluation.every")
        <class 'int'>
    """
    kind: Any = Run
    for name in path.split("."):
        kind = {f.name: f.type for f in fields(kind)}[name]
    return kind


def load_run(folder: Path, trust_remote_code: bool = True) -> Run:
    """Return the configuration of the run in `folder`.

    Args:
        folder: of the run.
        trust_remote_code: import the fields whose spec is `module:name`; see `from_json`.

    Raises:
        InputError: there is no run, or its configuration cannot be read.
    """
    record = read_config(folder)
    if record.get("kind") == SFT:
        raise InputError(
            f"{folder}: a run of `drpo sft`, which has no rollouts; to train its model further: drpo train RECIPE "
            f"--model {as_typed(folder)}; to go on with it: drpo sft --resume {as_typed(folder)}"
        )
    try:
        return from_json(record, trust_remote_code)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None


def _read(value: Any, kind: Any, path: str, name: str, trust_remote_code: bool) -> Any:
    """The value at a path, which messages call `name`."""
    if path in _REGISTRY_AT:
        optional = value is None and NoneType in get_args(kind)
        return None if optional else _from_spec(value, _REGISTRY_AT[path], name, trust_remote_code)
    if is_dataclass(kind):
        return _record(value, kind, path, trust_remote_code)
    if path == FIELDS["max_grad_norm"] and value in (OFF, math.inf):
        return math.inf
    return _typed(name, value, kind)


def _record(value: Any, kind: Any, path: str, trust_remote_code: bool) -> Any:
    require(isinstance(value, Mapping), path or "configuration", _shown(value), "must be an object with named fields")
    kinds = {f.name: f.type for f in fields(kind)}
    values = {}
    for name, inner in value.items():
        at = _within(path, name)
        if name not in kinds:
            raise InputError(f"unknown field {at!r} in the configuration{nearest(name, kinds)}")
        values[name] = _read(inner, kinds[name], at, at, trust_remote_code)
    try:
        return kind(**values)
    except InputError as error:  # which names the option
        name, _, rest = str(error).partition("=")
        raise InputError(f"{FIELDS.get(name, name)}={rest}") from None


def _within(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _from_spec(value: Any, registry: Registry[Any], name: str, trust_remote_code: bool) -> Any:
    require(isinstance(value, str), name, _shown(value), "must be text, as on the command line")
    if not trust_remote_code and (runs_code(value) or (registry is rewards.REGISTRY and contacts(value))):
        return Unimported(value)
    if registry is objectives.REGISTRY:
        methods.require_no_method(value)
    try:
        return parse_spec(value, registry)
    except InputError as error:
        raise (error if name in str(error) else InputError(f"{name}: {error}")) from None


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value of a field as its annotation has it; numbers are finite, and fit 64 bits."""
    try:
        typed = msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeError) as error:  # half a surrogate pair
        known = f"; known: {', '.join(get_args(kind))}" if get_origin(kind) is Literal else ""
        raise InputError(f"{name}={_shown(value)}: {error}{known}".replace("`", "")) from None
    for number in typed if isinstance(typed, tuple) else (typed,):
        fine = not isinstance(number, int | float) or (abs(number) <= _LARGEST and math.isfinite(number))
        require(fine, name, _shown(value), "is too large, or no number")
    return typed


def _shown(value: Any) -> str:
    """A value for a message: one line, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits; nested too deeply
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
