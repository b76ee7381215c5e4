"""The fields of a run as options of a command, in the sections of `drpo.train.fields`."""

import re
from collections.abc import Collection, Mapping
from dataclasses import field, fields, make_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

import tyro
from docstring_parser import parse as read_docstring
from tyro.constructors import PrimitiveConstructorSpec

from drpo.cli.methods import method_changes
from drpo.cli.options import given, parse
from drpo.cli.template_options import read_template, split_template
from drpo.recipes import find, is_recipe_file
from drpo.reductions import Horizon
from drpo.train.chapters import MAY_CHANGE
from drpo.train.config import REGISTRIES, Run, configure, flat_json, kind_of, load_run, read_value
from drpo.train.fields import FIELDS, sections

Options = TypeVar("Options")

TEMPLATE = "chat_template"
RATE, RATE_HELP = "learning_rate", "the peak; replaces the learning rate of --optimizer"

_OBJECTS = "Objects are written as specs: drpo(0.2), mean."
OF_THE_RECIPE = (
    f"The other options are the fields of a run; those not given are the recipe's. {_OBJECTS} One step is one rollout: "
    "`prompts` problems, `sampling.samples` completions of each, `updates` optimiser updates."
)
OF_THE_RUN = f"The other options are fields of the run, as they are now; those not given stay. {_OBJECTS}"


def overridden(
    run: Run, arguments: list[str], prog: str, others: type[Options], without: Collection[str] = ()
) -> tuple[Run, Options]:
    """Apply `--field value` overrides to a recipe's run, and read the options of a dataclass besides; see `changes`.

    Raises:
        InputError: an unknown option, or a value that the option or the run rejects.
    """
    changed, options = changes(run, arguments, prog, others, without)
    return configure(run, **changed), options


def changes(
    run: Run,
    arguments: list[str],
    prog: str,
    others: type[Options],
    without: Collection[str] = (),
    about: str = OF_THE_RECIPE,
) -> tuple[dict[str, Any], Options]:
    """Read `--field value` overrides of a run, for `configure`, and the options of a dataclass besides.

    Args:
        run: the recipe's, or that of a folder, whose code need not be imported.
        arguments: of the command line.
        prog: the command's name, for messages.
        others: the other options; one with the name of a run's field replaces it, and one called `method` sets what a
            paper does, where no option says otherwise.
        without: fields of the run that cannot be overridden here.
        about: what the help says of the fields.

    Raises:
        InputError: an unknown option, or a value that the option rejects.
    """
    of_template, arguments = split_template(arguments)
    own = {f.name for f in fields(others)}  # type: ignore[arg-type]
    hidden = own | {"template", *without}
    recipe = flat_json(run)
    columns: list[Any] = []
    shown = {
        f"{title}_fields" if title in own else title: [name for name in names if name not in hidden]
        for title, names in sections().items()
    }
    shown = {title: names for title, names in shown.items() if names}
    for title, names in shown.items():
        section = make_dataclass(title, [_column(name, recipe) for name in names], frozen=True)
        section.__doc__ = ""
        columns.append((title, section, field(default_factory=section)))
    kind = make_dataclass("Fields", columns, bases=(others,), frozen=True)
    kind.__doc__ = others.__doc__
    chosen: Any = parse(
        kind, arguments, prog, more=about, config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    )
    values = {
        name: getattr(getattr(chosen, title), _identifier(name)) for title, names in shown.items() for name in names
    }
    rate, template = values.pop(RATE, None), values.pop(TEMPLATE, None)
    changed = {name: read_value(name, value) for name, value in values.items() if value != _shown(name, recipe)}
    options = others(**{f.name: getattr(chosen, f.name) for f in fields(others)})  # type: ignore[arg-type]
    if (method := getattr(options, "method", None)) is not None:
        changed = method_changes(run, method, changed, given(arguments)) | changed
    changed |= {} if rate is None else {RATE: rate}
    changed |= {} if template is None else {TEMPLATE: read_template(template)}
    changed |= {"template": {**(recipe["template"] or {}), **of_template}} if of_template else {}
    return changed, options


def changes_of_run(
    folder: Path, arguments: list[str], prog: str, others: type[Options]
) -> tuple[dict[str, Any], Options]:
    """Read the changes of a run that goes on, without running its code; see `changes`.

    Raises:
        InputError: there is no run, an unknown option, or a value that the option rejects.
    """
    run = load_run(folder, trust_remote_code=False)
    return changes(run, arguments, prog, others, FIELDS.keys() - set(MAY_CHANGE), OF_THE_RUN)


def recipe_run(
    name: str, arguments: list[str], prog: str, others: type[Options], without: Collection[str] = ()
) -> tuple[Run, Options]:
    """Return a recipe's run with the command line's overrides, and the other options; see `overridden`.

    The horizon of a recipe's file follows --sampling.max-new-tokens where it is that number in the file.
    """
    recipe = find(name)
    run, options = overridden(recipe, arguments, prog, others, without)
    before, now = (r.rollout.sampling.max_new_tokens for r in (recipe, run))
    if is_recipe_file(name) and run.objective.reduction == Horizon(before) and "reduction" not in given(arguments):
        run = configure(run, reduction=Horizon(now))
    return run, options


@cache
def helps(kind: type) -> Mapping[str, str]:
    """Return the Args of a docstring: name -> text."""
    arguments = read_docstring(kind.__doc__ or "").params
    return {name.strip(): " ".join((p.description or "").split()) for p in arguments for name in p.arg_name.split(",")}


def _help(name: str, text: str) -> str:
    """Return the help of a field; where it names some of its registry, the names that it leaves out follow."""
    entries = REGISTRIES[name].entries if name in REGISTRIES else ()
    also = [entry for entry in entries if not re.search(rf"\b{entry}\b", text)]
    return f"{text} Also: {', '.join(also)}." if 0 < len(also) < len(entries) else text


def _column(name: str, recipe: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return a run's field as a field of a section: its name, its annotated type, and the recipe's value."""
    if name == RATE:
        return RATE, Annotated[float | None, tyro.conf.arg(help=RATE_HELP)], field(default=None)
    kind, (record, _, inner) = kind_of(FIELDS[name]), FIELDS[name].rpartition(".")
    about, default = _help(name, helps(kind_of(record) if record else Run)[inner]), _shown(name, recipe)
    hint = "(default: none)" if default == () else None
    shown = tyro.conf.arg(name=name, help=about, help_behavior_hint=hint)
    if name == TEMPLATE:
        return TEMPLATE, Annotated[Path | None, shown], field(default=None)
    if name in REGISTRIES:
        optional = NoneType in get_args(kind)
        kind = Annotated[str | None if optional else str, _spec(name, optional)]
    return _identifier(name), Annotated[kind, shown], field(default=default)


def _shown(name: str, recipe: Mapping[str, Any]) -> Any:
    """Return a recipe's value for tyro; in JSON infinite numbers are text, and tuples lists."""
    value = recipe[name]
    return float(value) if kind_of(FIELDS[name]) is float else tuple(value) if isinstance(value, list) else value


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _spec(name: str, optional: bool) -> PrimitiveConstructorSpec[Any]:
    """Return how tyro parses and shows a spec, `name(arguments)`; it stays text until the run is built."""
    shown = name.removeprefix("eval_").removeprefix("critic_").upper()
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None}}|{shown}(...)" if optional else f"{shown}(...)",
        instance_from_str=lambda words: None if optional and words[0].lower() == "none" else words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )
