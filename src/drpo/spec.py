"""Specs: one way to write an object as text, `name(1, 2, key='value')`. Parsed, never evaluated."""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from drpo.errors import InputError, describe, nearest
from drpo.extras import missing

T = TypeVar("T")

SAFE_PATH = "drpo"
"""PYTHONSAFEPATH in the command's children: Python processes that do not look for modules in the working folder."""


@dataclasses.dataclass(frozen=True)
class Registry(Generic[T]):
    """The names of one kind of object that a configuration holds; `parse_spec` and `format_spec` read and write them.

    Args:
        kind: what the object is, for messages: "objective".
        entries: name -> its class or a partial, the object itself (a function), or the `module:name` of either, which
            is imported on demand.
        instance_of: the class that every object must be an instance of; None allows any.
        explicit: names that are never written without their first argument, though it has a default.
        of_sum: builds the object of a sum, `a + 0.2*b`; None where there are no sums.
        summands: what such an object is the sum of; None for any other.
    """

    kind: str
    entries: Mapping[str, Callable[..., Any] | str]
    instance_of: type | None = None
    explicit: frozenset[str] = frozenset()
    of_sum: Callable[[Sequence["Summand[Any]"]], T] | None = None
    summands: Callable[[T], Sequence["Summand[Any]"] | None] | None = None


@dataclasses.dataclass(frozen=True)
class Summand(Generic[T]):
    """A weighted product of objects, which a sum such as `math_verify + 0.2*format*length(256)` has several of.

    Args:
        factors: the objects.
        weight: a number.
    """

    factors: tuple[T, ...]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Unimported:
    """Placeholder for an object with the spec `module:name`, where a configuration is read without importing code.

    Args:
        text: the spec.
    """

    text: str
    needs: ClassVar[frozenset[str]] = frozenset()


_STRING_OR_CODE = re.compile(
    r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|(?<![\w.])([^\W\d][\w.]*):(?=[^\W\d])""", re.DOTALL
)
_CODE = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*\s*(?:\(|\Z)")
_COLON = "__colon__"
"""In place of the colon of `module:name`, which is no Python, within an expression."""


def _marked(text: str) -> str:
    """A spec with `_COLON`, which is Python where the spec is a call or a sum."""
    return _STRING_OR_CODE.sub(lambda m: m[1] or f"{m[2]}{_COLON}", text.strip())


def _tree(text: str) -> ast.expr | None:
    """The tree of an expression; None where it is none."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_sum(tree: ast.expr | None) -> bool:
    return isinstance(tree, ast.BinOp | ast.UnaryOp)


def split_sum(text: str) -> list[Summand[str]] | None:
    """Split a weighted sum into the specs of its summands; None where the text is none.

    Raises:
        InputError: a sum of something else than specs, each times a number or another spec.

    Example:
        >>> for summand in split_sum("math_verify - 0.2*my_rewards:Brief(2)*format('think')"):
        ...     print(summand.weight, summand.factors)
        1.0 ('math_verify',)
        -0.2 ('my_rewards:Brief(2)', "format('think')")
        >>> split_sum("format('a + b')") is None
        True
    """
    marked = _marked(text)
    tree = _tree(marked)
    if tree is None or not _is_sum(tree):
        return None
    try:
        summands = [_summand(factors, sign, marked) for sign, factors in _terms(tree, 1.0)]
    except RecursionError:
        summands = [None]
    if None in summands:
        raise InputError(f"{text!r}: a sum is written 'a + 0.2*b', of specs and finite weights")
    return [summand for summand in summands if summand is not None]


def _terms(node: ast.expr, sign: float) -> list[tuple[float, list[ast.expr]]]:
    """The terms of a sum, each with its sign and its factors."""
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
            return _terms(left, sign) + _terms(right, sign if isinstance(op, ast.Add) else -sign)
        case ast.UnaryOp(ast.UAdd() | ast.USub() as op, operand):
            return _terms(operand, sign if isinstance(op, ast.UAdd) else -sign)
        case ast.BinOp(left, ast.Mult(), right):
            one, other = _terms(left, sign), _terms(right, 1.0)
            if min(len(one), len(other)) == 1:  # no product of sums
                return [(a * b, f + g) for a, f in one for b, g in other]
    return [(sign, [node])]


def _summand(factors: Sequence[ast.expr], sign: float, plain: str) -> Summand[str] | None:
    """A term of a sum; None where it is not one of specs and a finite weight."""
    numbers: list[Any] = [f.value for f in factors if isinstance(f, ast.Constant)]
    named = [f for f in factors if not isinstance(f, ast.Constant)]
    specs = bool(named) and all(isinstance(f, ast.Name | ast.Attribute | ast.Call) for f in named)
    if not specs or not all(type(n) in (int, float) and abs(n) < math.inf for n in numbers):
        return None
    texts = (str(ast.get_source_segment(plain, f)).replace(_COLON, ":") for f in named)
    weight = math.prod(map(float, numbers), start=sign)
    return Summand(tuple(texts), weight) if math.isfinite(weight) else None


def names_code(text: str) -> bool:
    """True for the spec of an object outside the registries, which is imported: `module:name` or `module:name(1, 2)`.

    Example:
        >>> names_code("my_rewards:exact"), names_code("records('C:/x.jsonl', 'question', 'answer')")
        (True, False)
    """
    module, colon, _ = text.partition(":")
    return bool(colon) and "(" not in module


def runs_code(text: str) -> bool:
    """True for a spec that imports what it names: `module:name`, or one of the registries with such an argument.

    Example:
        >>> runs_code("my_rewards:exact"), runs_code("tools('my_tools:search')"), runs_code("records('C:/x.jsonl')")
        (True, True, False)
    """
    nodes = [node for tree in (_tree(text), _tree(_marked(text))) if tree is not None for node in ast.walk(tree)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    strings = [c.strip().replace(_COLON, ":") for c in constants if isinstance(c, str)]
    within = any(_CODE.match(string) is not None or _sums_code(string) for string in strings)
    return names_code(text) or _sums_code(text) or within


def _sums_code(text: str) -> bool:
    """True for a sum with a `module:name` in it."""
    marked = _marked(text)
    return _COLON in marked and _is_sum(_tree(marked))


def contacts(text: str) -> bool:
    """True for a spec with an address in it.

    Example:
        >>> contacts("judge('http://localhost:8000/v1')"), contacts("exact_match(case=True)")
        (True, False)
    """
    return "://" in text


def split_call(text: str) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Split `"name(1, k='x')"` into its name, positional and keyword arguments, all literals.

    Raises:
        InputError: the text is not a name or a call with literal arguments.

    Example:
        >>> split_call("ppo(0.2, 0.28, dual=3)")
        ('ppo', (0.2, 0.28), {'dual': 3})
        >>> split_call("none")
        ('none', (), {})
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        name = ast.unparse(call.func)
        if not all(part.isidentifier() for part in name.split(".")) or any(k.arg is None for k in call.keywords):
            raise ValueError
        args = tuple(ast.literal_eval(a) for a in call.args)
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"{text!r} is not of the form name or name(1, 2, key='value')") from None
    return name, args, kwargs


def parse_spec(text: str, registry: Registry[T]) -> T:
    """Return the object of a spec; the text is parsed, never evaluated.

    Args:
        text: `name` or `name(arguments)` with a name of the registry, in small or capital letters, or `module:name`,
            `module:name(arguments)`; a weighted sum of these where the registry has sums.
        registry: of the kind of object that is expected.

    Raises:
        InputError: an unknown name (with the nearest known one), what cannot be imported, refused arguments, or an
            object of another class than the registry's.

    Example:
        >>> parse_spec("fractions:Fraction(3, 4)", Registry("number", {}))
        Fraction(3, 4)
    """
    summands = split_sum(text) if registry.of_sum else None
    if registry.of_sum and summands is not None:
        return registry.of_sum([Summand(tuple(parse_spec(f, registry) for f in s.factors), s.weight) for s in summands])
    value = _parsed(text, registry.entries, registry.kind)
    if registry.instance_of is not None and not isinstance(value, registry.instance_of):
        known = ", ".join(registry.entries)
        raise InputError(f"{registry.kind} {text!r}: must be a {registry.instance_of.__name__}; write {known}")
    return value  # type: ignore[no-any-return]


def _parsed(text: str, entries: Mapping[str, Callable[..., Any] | str], kind: str) -> Any:
    module, _, call = text.strip().partition(":")
    if not names_code(text):
        name, args, kwargs = split_call(text)
        name = name if name in entries else name.lower()
        if name not in entries:
            raise InputError(f"unknown {kind} {name!r}{nearest(name, entries)}")
        entry = _imported(entries[name], kind)
    elif not _CODE.match(text.strip()):
        raise InputError(f"{kind} {text!r} is not of the form module:name or module:name(1, 2, key='value')")
    else:
        name, args, kwargs = split_call(call)
        entry = import_named(module, name, kind)
    if isinstance(entry, type | functools.partial):
        return _make(entry, args, kwargs, text, kind)
    if args or kwargs:
        raise InputError(f"{kind} {text!r} takes no arguments; write {name!r}")
    return entry


def _make(maker: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], text: str, kind: str) -> Any:
    try:
        signature = inspect.signature(maker)
    except ValueError:  # some classes written in C do not say
        signature = None
    try:
        if signature:
            signature.bind(*args, **kwargs)
    except TypeError as error:
        arguments = str(signature).removesuffix(" -> None")
        raise InputError(f"{kind} {text!r}: {error}; the arguments are {arguments}") from None
    try:
        return maker(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f"{kind} {text!r}: {error}") from None


def import_named(module: str, name: str, kind: str) -> Any:
    """Import what `module:name` names; the working folder is looked through last, and only for what is not drpo's.

    It comes last, and only now, so that a file there cannot replace a library: a `torch.py`, say.

    Raises:
        InputError: the module cannot be imported or has no such name.

    Example:
        >>> import_named("math", "sqrt", "reward")(9.0)
        3.0
    """
    if module.partition(".")[0] != "drpo":
        with suppress(FileNotFoundError):  # the working folder may have been deleted
            here = str(Path.cwd())
            sys.path += [] if here in sys.path else [here]
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        told = isinstance(error, ImportError) and missing(error)
        raise InputError(told or f"{kind} '{module}:{name}' cannot be imported: {error}") from None
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise InputError(f"{kind} '{module}:{name}' cannot be imported: {describe(error)}{_line(error)}") from None
    return value


def _line(error: BaseException) -> str:
    """Where an error was raised: the file's name, and the line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def format_spec(value: T, registry: Registry[T]) -> str:
    """Return the spec of an object: `parse_spec` builds an equal one from it. Arguments that are defaults are left out.

    Raises:
        InputError: the value cannot be reached by a name of the registry or by `module:name`.
    """
    if isinstance(value, Unimported):
        return value.text
    if (summands := registry.summands and registry.summands(value)) is not None:
        return _format_sum(summands, registry)
    for name, entry in registry.entries.items():
        if _is(value, entry):
            return name
        if isinstance(entry, functools.partial) and value == entry():
            return name
        if _is(type(value), entry) and dataclasses.is_dataclass(value):
            return name + _arguments(value, explicit=name in registry.explicit)
    return _import_path(value, registry.kind)


def _format_sum(summands: Sequence[Summand[Any]], registry: Registry[Any]) -> str:
    """`a + 0.2*b`; a weight of 1 is written where the sum would not be one without it."""
    terms = []
    for summand in summands:
        product = "*".join(format_spec(factor, registry) for factor in summand.factors)
        size = abs(summand.weight)
        weighted = product if size == 1 and len(summands) + len(summand.factors) > 2 else f"{size!r}*{product}"
        terms.append(("-" if math.copysign(1, summand.weight) < 0 else "+", weighted))
    first, *others = terms
    head = first[1] if first[0] == "+" else f"-{first[1]}"
    return " ".join([head, *(f"{sign} {term}" for sign, term in others)])


def _imported(entry: Callable[..., Any] | str, kind: str) -> Any:
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return import_named(module, name, kind)


def _is(value: Any, entry: Callable[..., Any] | str) -> bool:
    if isinstance(entry, str):
        return entry == f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
    return value is entry


def _arguments(value: Any, explicit: bool = False) -> str:
    """`(1, 2, key='x')`: the fields that differ from their defaults, by name from the first gap on.

    Nothing where all are defaults; `explicit` writes the first field even then.
    """
    given = [(f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value)]
    differ = [default is dataclasses.MISSING or v != default for _, v, default in given]
    if not (explicit or any(differ)):
        return ""
    gap = next((i for i, d in enumerate(differ) if i and not d), len(given))
    shown = [repr(v) for _, v, _ in given[:gap]]
    shown += [f"{name}={v!r}" for (name, v, _), d in zip(given[gap:], differ[gap:], strict=True) if d]
    return f"({', '.join(shown)})"


def _import_path(value: Any, kind: str) -> str:
    """`module:name` of a function, of an object at the top of its class's module, or of its class with arguments."""
    named = value if hasattr(value, "__qualname__") else type(value)
    module, name = named.__module__, named.__qualname__
    if named is not value:
        names = [n for n, v in vars(sys.modules[module]).items() if v is value]
        if names:
            return f"{module}:{names[0]}"
        if dataclasses.is_dataclass(value):
            name += _arguments(value)
    if "<" in name or (named is not value and not dataclasses.is_dataclass(value)):
        made = named is not value and "<" not in name
        fix = f"make {name} a frozen dataclass" if made else "give it one at the top level of a module"
        raise InputError(f"{kind} {value!r} has no name to record it by; {fix}")
    return f"{module}:{name}"
