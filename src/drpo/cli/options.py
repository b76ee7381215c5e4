"""Options from dataclasses, by tyro; whatever is wrong with them becomes one line."""

import difflib
import io
import re
from collections.abc import Collection, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, field, fields, make_dataclass
from inspect import cleandoc
from typing import Annotated, Any, TypeVar

import tyro

from drpo.errors import InputError
from drpo.train.config import NESTED, SPELLED, Run, from_json, to_json, with_learning_rate

Options = TypeVar("Options")

RATE, RATE_HELP = "learning_rate", "the peak; replaces the learning rate of --optimizer"
"""The number that is changed most often has an option of its own."""

OF_THE_RECIPE = (
    "The other options are the fields of a run; those not given are the recipe's. Objects are written as they are "
    "spelled: drpo(0.2), mean. One step is one rollout: `prompts` problems, `sampling.samples` completions of each, "
    "`updates` optimiser updates."
)


def asks_for_help(arguments: Collection[str]) -> bool:
    """Whether a command line asks what it could be."""
    return "-h" in arguments or "--help" in arguments


def leading(arguments: list[str], placeholder: str, missing: str) -> tuple[str, list[str]]:
    """Return what a command is about, which is its first argument, and the options behind it.

    Args:
        arguments: of the command.
        placeholder: stands for it where help is asked for and nothing else.
        missing: what to say where it is not given.

    Raises:
        InputError: it is not given.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if asks_for_help(arguments):
        return placeholder, arguments
    raise InputError(missing)


def described(kind: type) -> dict[str, str]:
    """The Args section of a docstring: name -> text."""
    section = (kind.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def parse(
    kind: type[Options], arguments: list[str], prog: str, default: Options | None = None, description: str | None = None
) -> Options:
    """Parse with tyro; what it would print in a box over many lines becomes one line of an InputError."""
    if asks_for_help(arguments):
        tyro.cli(kind, prog=prog, args=["--help"], description=description or _about(kind), **_default(default))
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
    for f in fields(others):  # type: ignore[arg-type]
        columns.append((f.name, Annotated[f.type, _explained(others, f, defaults)], _field(f)))
    for f in overridable:
        value = getattr(run, f.name)
        kind: Any = str if f.name in SPELLED and value is not None else str | None if f.name in SPELLED else f.type
        shown = value if f.name not in SPELLED else defaults[f.name]
        columns.append((f.name, Annotated[kind, tyro.conf.arg(help=helps[f.name])], field(default=shown)))
    if RATE not in own:
        columns.append((RATE, Annotated[float | None, tyro.conf.arg(help=RATE_HELP)], field(default=None)))
    flat = make_dataclass("Fields", columns, frozen=True)
    given: Any = parse(flat, arguments, prog, description=f"{_about(others)}\n\n{OF_THE_RECIPE}")
    record = defaults | {f.name: getattr(given, f.name) for f in overridable}
    record |= {name: vars(record[name]) for name, kind in NESTED.items() if isinstance(record[name], kind)}
    options = others(**{f.name: getattr(given, f.name) for f in fields(others)})  # type: ignore[arg-type]
    rate = None if RATE in own else getattr(given, RATE)
    return from_json(record) if rate is None else with_learning_rate(from_json(record), rate), options


def _about(kind: type) -> str:
    """What a docstring says before its Args."""
    return cleandoc((kind.__doc__ or "").split("Args:")[0])


def _explained(others: type, f: Any, recipe: Mapping[str, Any]) -> Any:
    """What the help says of a field of other options; nothing given means the recipe's value where it has one."""
    shown = f"(default: the recipe's, {recipe[f.name]})" if f.name in recipe else "(default: none)"
    return tyro.conf.arg(help=described(others)[f.name], help_behavior_hint=shown if f.default == () else None)


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
            flags += [f"--{name}", f"--no-{name}"] if isinstance(nested, bool) else [f"--{name}"]
    return flags
