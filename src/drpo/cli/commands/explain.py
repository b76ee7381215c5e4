"""`drpo explain`."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from textwrap import fill

from drpo.cli.options import parse
from drpo.errors import InputError, nearest
from drpo.spec import import_named
from drpo.train.metric_tables import KINDS, Meaning, find
from drpo.train.run_warnings import PAGE, RULES, Rule

_NAMES = "drpo.cli.explain"
"""Imported where a name is no metric's: it needs torch."""
_MISSPELT = 0.85
"""From this likeness on a name is a misspelt metric or warning; no name of an option is so like one."""
_WIDEST = 120


@dataclass(frozen=True)
class ExplainOptions:
    """Say what a metric or a warning means, how it is computed, what is normal, and what to do.

      drpo explain entropy_collapse

    A method, an objective, a reward or another name that an option takes is described too. Without a name it lists all
    metrics and warnings.
    """


def explain(arguments: list[str]) -> int:
    """`drpo explain [NAME]`."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    parse(ExplainOptions, [argument for argument in arguments if argument not in names], "drpo explain [NAME]")
    if len(names) > 1:
        raise InputError(f"explain takes one name, not {len(names)}: {' '.join(names)}")
    for line in _one(names[0]) if names else _all():
        print(line)
    return 0


def _all() -> Iterator[str]:
    yield "Warnings"
    yield from (_row(rule.name, rule.means) for rule in RULES)
    for title, table in KINDS.items():
        yield f"\n{title}"
        yield from (_row(name, meaning.text) for name, meaning in table.items())


def _one(name: str) -> Iterator[str]:
    rule = next((rule for rule in RULES if rule.name == name.removeprefix("warnings/")), None)
    if rule is not None:
        return _warning(rule)
    if (found := find(name)) is not None:
        return _metric(*found)
    names = [*(rule.name for rule in RULES), *(key for table in KINDS.values() for key in table)]
    if not get_close_matches(name, names, cutoff=_MISSPELT):
        meanings: list[tuple[str, str]] = list(import_named(_NAMES, "meanings", "command")(name))
        if meanings:
            return iter("\n\n".join(f"{head}\n\n{text}" for head, text in meanings).split("\n"))
        names += import_named(_NAMES, "names", "command")()
    hint = nearest(name, names)
    fix = hint if "did you mean" in hint else "; drpo explain lists all names"
    raise InputError(f"explain {name!r}: no metric, warning, method, objective or reward has this name{fix}")


def _warning(rule: Rule) -> Iterator[str]:
    yield f"{rule.name}: a warning"
    yield _row("means", rule.means)
    yield _row("raised at", rule.threshold)
    yield _row("why there", rule.reason)
    yield _row("what to do", rule.advice)
    yield _row("reads", ", ".join(rule.reads))
    yield _row("more", f"{PAGE}#{rule.name}")


def _metric(name: str, meaning: Meaning) -> Iterator[str]:
    yield f"{name}: a metric"
    yield _row("means", meaning.text)
    if meaning.normal:
        yield _row("normal", meaning.normal)
    if meaning.advice:
        yield _row("what to do", meaning.advice)
    for rule in RULES:
        if name in rule.reads:
            yield _row("warning", f"{rule.name}: {rule.threshold}")


def _row(head: str, text: str) -> str:
    """A text beside its head, or below a long head."""
    width, indent = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns), " " * 14
    if len(head) > 11:
        return f"  {head}\n" + fill(text, width, initial_indent=indent, subsequent_indent=indent)
    return fill(text, width, initial_indent=f"  {head:<11} ", subsequent_indent=indent)
