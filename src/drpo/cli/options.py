"""Options from dataclasses, by tyro; whatever is wrong with them becomes one line."""

import difflib
import io
import re
from collections.abc import Collection
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, TypeVar

import tyro

from drpo.errors import InputError
from drpo.train.config import NESTED, SPELLED, Run, from_json, to_json

Options = TypeVar("Options")


def described(kind: type) -> dict[str, str]:
    """The Args section of a docstring: name -> text."""
    section = (kind.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def parse(
    kind: type[Options], arguments: list[str], prog: str, default: Options | None = None, description: str | None = None
) -> Options:
    """Parse with tyro; what it would print in a box over many lines becomes one line of an InputError."""
    if "-h" in arguments or "--help" in arguments:
        tyro.cli(kind, prog=prog, args=["--help"], description=description, **_default(default))
    said = io.StringIO()
    parsed: Options
    try:
        with redirect_stderr(said), redirect_stdout(said):
            parsed, unknown = tyro.cli(kind, prog=prog, args=arguments, return_unknown_args=True, **_default(default))
    except SystemExit:
        raise InputError(f"{_one_line(said.getvalue())}; see {prog} --help") from None
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], _flags(kind), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"see {prog} --help"
        raise InputError(f"unknown option {unknown[0]!r}; {hint}")
    return parsed


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
    """
    own = {f.name for f in fields(others)} | set(without)  # type: ignore[arg-type]
    overridable = [f for f in fields(Run) if f.name not in own]
    defaults = to_json(run)
    helps = described(Run)
    columns: list[Any] = []
    for f in overridable:
        value = getattr(run, f.name)
        kind: Any = str if f.name in SPELLED and value is not None else str | None if f.name in SPELLED else f.type
        shown = value if f.name not in SPELLED else defaults[f.name]
        columns.append((f.name, Annotated[kind, tyro.conf.arg(help=helps[f.name])], field(default=shown)))
    for f in fields(others):  # type: ignore[arg-type]
        help_text = described(others)[f.name]
        columns.append((f.name, Annotated[f.type, tyro.conf.arg(help=help_text)], _field(f)))
    flat = make_dataclass("Fields", columns, frozen=True)
    given: Any = parse(flat, arguments, prog, description=(Run.__doc__ or "").split("Args:")[0])
    record = defaults | {f.name: getattr(given, f.name) for f in overridable}
    record |= {name: vars(record[name]) for name, kind in NESTED.items() if isinstance(record[name], kind)}
    options = others(**{f.name: getattr(given, f.name) for f in fields(others)})  # type: ignore[arg-type]
    return from_json(record), options


def _field(f: Any) -> Any:
    """A field of another dataclass with the same default."""
    return field(default=f.default) if f.default_factory is MISSING else field(default_factory=f.default_factory)


def _one_line(box: str) -> str:
    """The sentence inside one of tyro's boxes."""
    text = " ".join(re.sub(r"[│╭╮╰╯─+|]|-{3,}", " ", box).split())
    text = re.split(r"Argument helptext|For full helptext", text)[0]
    return re.sub(r"^(Parsing|Value) error ", "", text).strip()


def _default(default: object | None) -> dict[str, Any]:
    return {} if default is None else {"default": default}


def _flags(kind: Any) -> list[str]:
    """The long options that tyro makes of a dataclass."""
    flags: list[str] = []
    for f in fields(kind):
        name = f.name.replace("_", "-")
        nested: Any = (
            f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
        )
        if type(nested) in NESTED.values():
            flags += [f"--{name}.{inner.name.replace('_', '-')}" for inner in fields(nested)]
        else:
            flags.append(f"--{name}")
    return flags
