"""`--method NAME`: what it changes of a run, and the lines that say so."""

from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console

from drpo import methods
from drpo.train.config import Run, configure, episode_tokens, value_of

_BUDGET = ("task", "environment", "max_turns", "max_episode_tokens", "sampling.max_new_tokens")
"""The options that say how many tokens an episode can have."""
_OF_GROUPS = ("advantage", "whiten", "dynamic_sampling")
"""What compares a prompt's samples; a critic does not."""


def method_changes(run: Run, name: str, changes: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return what a method changes of a run, for `configure`: the fields that it sets and no option names.

    Args:
        run: the recipe's.
        name: of the method.
        changes: the options' values that differ from the recipe's, by the names of their fields.
        given: the names of all options of the command line.

    Raises:
        InputError: no method of this name; the nearest is named.
    """
    resized = configure(run, **{field: changes[field] for field in _BUDGET if field in changes})
    options = methods.find(name, episode_tokens(resized)).options
    if "critic" in given and changes.get("critic", value_of(run, "critic")) is not None:
        options = {field: value for field, value in options.items() if field not in _OF_GROUPS}
    return {field: value for field, value in options.items() if not {field, f"no_{field}"} & {*given}}


def method_lines(run: Run, name: str) -> list[str]:
    """Return what a method set of a run, what the run has instead, and what the method leaves out.

    Args:
        run: with the method, and with what options changed of it.
        name: of the method.

    Example:
        >>> from drpo.recipes.addition import demo
        >>> from drpo.reductions import token_mean
        >>> dr_grpo = configure(demo(), **method_changes(demo(), "dr_grpo", {}, ()))
        >>> method_lines(configure(dr_grpo, reduction=token_mean), "Dr. GRPO")
        ["method Dr. GRPO, arXiv 2503.20783: --objective 'ppo(low=0.2, high=0.2)' --advantage mean --reduction \
'horizon(32)'; by your options --reduction token_mean instead"]
    """
    method = methods.find(name, episode_tokens(run))
    changed = [field for field, value in method.options.items() if value_of(run, field) != value]
    others = [methods.option(field, value_of(run, field)) for field in changed]
    given = f"; by your options {' '.join(others)} instead" if others else ""
    line = f"method {name}, {method.source}: {methods.described(method)}{given}"
    return [line, *([f"  without {method.without}"] if method.without else [])]


def print_method(console: Console, run: Run, name: str | None) -> None:
    """Print `method_lines`; nothing without a method."""
    if name is not None:
        console.print("\n".join(method_lines(run, name)), soft_wrap=True, highlight=False)
