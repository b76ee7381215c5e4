"""Options from dataclasses, parsed by tyro; errors become one line."""

import difflib
import io
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from inspect import cleandoc
from itertools import zip_longest
from typing import Any, NoReturn, TypeVar

import tyro

# tyro's only report of an error besides a box on the terminal. It is private: pyproject.toml bounds the version.
from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, ParseErrorEvent, on_parse_error

from drpo.cli.template_options import PREFIX
from drpo.errors import InputError, nearest
from drpo.terminal import without_padding
from drpo.train.fields import FIELDS

Options = TypeVar("Options")


def asks_for_help(arguments: Collection[str]) -> bool:
    """Whether a command line asks for help."""
    return "-h" in arguments or "--help" in arguments


def leading(arguments: list[str], placeholder: str, missing: str) -> tuple[str, list[str]]:
    """Split a command line into its first argument and the options.

    Args:
        arguments: of the command.
        placeholder: its name in the help, if only help is asked for.
        missing: the error message if it is missing.

    Raises:
        InputError: the argument is missing.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if asks_for_help(arguments):
        return placeholder, arguments
    raise InputError(missing)


def parse(
    kind: type[Options],
    arguments: list[str],
    prog: str,
    default: Options | None = None,
    more: str = "",
    config: Sequence[Any] = (),
) -> Options:
    """Parse options with tyro, or print their help and exit.

    Args:
        kind: dataclass of the options; the Args of its docstring are the help texts.
        arguments: of the command line.
        prog: the command's name.
        default: default values; None for the dataclass's own.
        more: a paragraph of help, after the docstring.
        config: tyro's markers.

    Raises:
        InputError: an option is unknown or invalid.
    """
    given: dict[str, Any] = {"prog": prog, "config": config} | ({} if default is None else {"default": default})
    if asks_for_help(arguments):
        described = "\n\n".join(filter(None, (_about(kind), more)))
        with _unpadded():
            tyro.cli(kind, args=["--help"], description=described, **given)
    parsed: Options
    with on_parse_error(_refuse):
        parsed, unknown = tyro.cli(kind, args=arguments, return_unknown_args=True, **given)
    if unknown:
        _refuse_unknown(unknown[0], flags(kind), prog)
    return parsed


@contextmanager
def _unpadded() -> Iterator[None]:
    """Print the block's output without the spaces that tyro puts at the ends of lines, unless a terminal shows it."""
    if sys.stdout.isatty():
        yield
        return
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            yield
    finally:
        sys.stdout.write(without_padding(out.getvalue()))


def require_options(arguments: Collection[str], kind: type, prog: str) -> None:
    """Raise for an option that belongs neither to the dataclass nor to a run, before torch is imported.

    Args:
        arguments: of the command line.
        kind: dataclass of the options besides those of a run.
        prog: the command's name.

    Raises:
        InputError: an unknown option; the message suggests the nearest.
    """
    known = [*flags(kind), "--help", *map(flag, FIELDS)]
    for argument in arguments:
        if argument.startswith(PREFIX):
            continue
        name = argument.split("=")[0].replace("_", "-")
        if argument.startswith("--") and name not in known and name.replace("--no-", "--", 1) not in known:
            _refuse_unknown(argument, known, prog)


def given(arguments: Collection[str]) -> set[str]:
    """Return the names of the options of a command line.

    Example:
        >>> sorted(given(["--sampling.max-new-tokens=8", "--steps", "2"]))
        ['sampling.max_new_tokens', 'steps']
    """
    return {_name_in(argument) for argument in arguments if argument.startswith("--")}


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the last value of an option, before the command line is parsed; None if the option is not there.

    Args:
        arguments: of the command line.
        name: of the option's field.

    Raises:
        InputError: the option is there without a value.

    Example:
        >>> option_value(["--prompt-field", "q", "--steps=2"], "prompt_field"), option_value([], "steps")
        ('q', None)
    """
    found = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument.startswith("--") and _name_in(argument) == name:
            found = argument.partition("=")[2] if "=" in argument else following
            if found is None or (found is following and found.startswith("--")):
                raise InputError(f"{flag(name)}: a value is missing")
    return found


def _name_in(argument: str) -> str:
    return argument.split("=")[0].removeprefix("--").replace("-", "_")


def flag(name: str) -> str:
    """Return a field's option.

    Example:
        >>> flag("sampling.top_k")
        '--sampling.top-k'
    """
    return f"--{name.replace('_', '-')}"


def flags(kind: Any) -> list[str]:
    """Return the options of a dataclass; those of a nested one as `--record.field`."""
    options: list[str] = []
    for f in fields(kind):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if is_dataclass(default):
            options += [flag(f"{f.name}.{inner.name}") for inner in fields(default)]
        else:
            options += [flag(f.name), flag(f"no_{f.name}")] if isinstance(default, bool) else [flag(f.name)]
    return options


def _about(kind: type) -> str:
    """Return a docstring up to its Args."""
    return cleandoc((kind.__doc__ or "").split("Args:")[0])


def _refuse_unknown(argument: str, known: Collection[str], prog: str) -> NoReturn:
    # Without the dashes, which all options have in common.
    names, name = [name.lstrip("-") for name in known], argument.split("=")[0].lstrip("-")
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '--{close[0]}'?" if close else f"see {prog} --help"
    if name.startswith("warmup"):  # as elsewhere; `--warm-up` is something else
        hint = "the learning rate's is --schedule 'linear(warmup=STEPS)'"
    raise InputError(f"unknown option {argument!r}; {hint}")


def _refuse(event: ParseErrorEvent) -> NoReturn:
    """Raise tyro's error as one line, in place of its box."""
    match event:
        case BadValue(argument=argument):
            wrong = f"{_name(argument)}: a value is missing; it takes {argument.lowered.metavar}"
        case InvalidChoice(argument=argument, value=value, choices=choices):
            wrong = f"{_name(argument)} {value!r}{nearest(value, choices)}"
        case InstantiationFailure(argument=argument, message=message):
            wrong = message if argument is None else _unreadable(argument, message)
        case MissingArgs(missing_arguments=missing):
            wrong = f"{_name(missing[0].arg)} is missing"
        case _:
            wrong = f"the options cannot be read ({type(event).__name__})"
    raise InputError(f"{' '.join(wrong.split())}; see {event.prog} --help") from sys.exception()


def _unreadable(argument: Any, message: str) -> str:
    """Return what is wrong with a value; Python's own message has the value at its end."""
    kind = (argument.lowered.metavar or "").removeprefix("{None}|")
    rules = {"INT": "must be a whole number", "FLOAT": "must be a number"}
    rules |= {"[INT [INT ...]]": "must be whole numbers", "[FLOAT [FLOAT ...]]": "must be numbers"}
    rule = rules.get(kind)
    told = f": {message}" if rule is None else f" {message.rpartition(': ')[2]}: {rule}"
    return f"{_name(argument)}{told}"


def _name(argument: Any) -> str:
    """Return an option as written, or the placeholder of a positional argument."""
    names = argument.lowered.name_or_flags
    return str(names[0] if names[0].startswith("-") else argument.lowered.metavar or names[0])
