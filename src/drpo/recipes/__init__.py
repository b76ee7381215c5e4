"""Recipes: functions that return a `Run`. The docstring's first line is what `drpo recipes` prints."""

from collections.abc import Callable, Mapping

from drpo.errors import InputError, nearest
from drpo.recipes.addition import demo, smoke
from drpo.recipes.math import drpo_paper, gsm8k
from drpo.train.config import Run

RECIPES: Mapping[str, Callable[[], Run]] = {"demo": demo, "smoke": smoke, "gsm8k": gsm8k, "drpo_paper": drpo_paper}


def find(name: str) -> Run:
    """Return the run that a recipe's name stands for.

    Raises:
        InputError: no recipe of this name; the nearest one is named.

    Example:
        >>> find("demo").name
        'demo'
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "demo", "drpo_paper", "find", "gsm8k", "smoke"]
