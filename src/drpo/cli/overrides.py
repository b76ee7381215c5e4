"""The fields of a run as options of a command, in the sections of `drpo.train.sections`."""

from collections.abc import Collection, Mapping
from dataclasses import field, fields, make_dataclass
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

import tyro
from docstring_parser import parse as read_docstring
from tyro.constructors import PrimitiveConstructorSpec

from drpo.cli.options import parse
from drpo.train.config import NESTED, REGISTRIES, Run, from_json, to_json, with_learning_rate
from drpo.train.sections import SECTIONS

Options = TypeVar("Options")

RATE, RATE_HELP = "learning_rate", "the peak; replaces the learning rate of --optimizer"
"""The number that is changed most often has an option of its own."""

OF_THE_RECIPE = (
    "The other options are the fields of a run; those not given are the recipe's. Objects are written as "
    "specs: drpo(0.2), mean. One step is one rollout: `prompts` problems, `sampling.samples` completions of each, "
    "`updates` optimiser updates."
)


def overridden(
    run: Run, arguments: list[str], prog: str, others: type[Options], without: Collection[str] = ()
) -> tuple[Run, Options]:
    """Apply `--field value` overrides to a recipe's run, and read the options of a dataclass besides.

    Args:
        run: the recipe's.
        arguments: of the command line.
        prog: what to call the command in messages.
        others: the options besides; where one has the name of a field of the run, it stands in its place.
        without: fields of the run that cannot be overridden here.

    Raises:
        InputError: an option is unknown, or has a value that it or the run refuses.
    """
    hidden = {f.name for f in fields(others)} | set(without)  # type: ignore[arg-type]
    recipe = to_json(run)
    columns: list[Any] = []
    shown = {title: [name for name in names if name not in hidden] for title, names in SECTIONS.items()}
    for title, names in shown.items():
        section = make_dataclass(title, [_column(name, recipe) for name in names], frozen=True)
        section.__doc__ = ""
        columns.append((title, section, field(default_factory=section)))
    kind = make_dataclass("Fields", columns, bases=(others,), frozen=True)
    kind.__doc__ = others.__doc__
    given: Any = parse(kind, arguments, prog, more=OF_THE_RECIPE, config=(tyro.conf.OmitArgPrefixes,))
    record = {name: dict(value) if name in NESTED else value for name, value in recipe.items()}
    for title, names in shown.items():
        for name in names:
            record_name, _, inner = name.rpartition(".")
            (record[record_name] if record_name else record)[inner] = getattr(getattr(given, title), _identifier(name))
    options = others(**{f.name: getattr(given, f.name) for f in fields(others)})  # type: ignore[arg-type]
    rate: Any = record.pop(RATE, None)
    return from_json(record) if rate is None else with_learning_rate(from_json(record), rate), options


def helps(kind: type) -> Mapping[str, str]:
    """Return what the Args of a docstring say: name -> text."""
    said = read_docstring(kind.__doc__ or "").params
    return {name.strip(): " ".join((p.description or "").split()) for p in said for name in p.arg_name.split(",")}


def _column(name: str, recipe: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """A field of a run as one of a section: its name, its type with its help, and the recipe's value."""
    if name == RATE:
        return RATE, Annotated[float | None, tyro.conf.arg(help=RATE_HELP)], field(default=None)
    record_name, _, inner = name.rpartition(".")
    owner = NESTED[record_name] if record_name else Run
    kind: Any = next(f.type for f in fields(owner) if f.name == inner)
    value = recipe[record_name][inner] if record_name else recipe[inner]
    value = tuple(value) if isinstance(value, list) else float(value) if kind is float else value
    shown = tyro.conf.arg(name=name, help=helps(owner)[inner])
    if name in REGISTRIES:
        optional = NoneType in get_args(kind)
        kind = Annotated[str | None if optional else str, _spec(name, optional)]
    return _identifier(name), Annotated[kind, shown], field(default=value)


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _spec(name: str, optional: bool) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads and shows an object that is written as `name(arguments)`; it stays text until the run is built."""
    shown = name.rpartition("_")[2].upper()
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None}}|{shown}(...)" if optional else f"{shown}(...)",
        instance_from_str=lambda words: None if optional and words[0] == "None" else words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )
