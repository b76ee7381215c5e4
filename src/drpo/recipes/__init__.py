"""Recipes by name: functions that return a `Run`, each imported when it is asked for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from drpo.errors import InputError, nearest
from drpo.spec import import_named

if TYPE_CHECKING:
    from drpo.train.config import Run


class Recipe(NamedTuple):
    """A recipe that is not yet imported.

    Args:
        module: that holds the function of the recipe's name.
        about: what `drpo recipes` says of it, a line.
    """

    module: str
    about: str


RECIPES: Mapping[str, Recipe] = {
    "demo": Recipe("drpo.recipes.addition", "SmolLM2-135M learns to add with DRPO, on a laptop's CPU, in minutes."),
    "smoke": Recipe(
        "drpo.recipes.addition", "A random two-layer model goes through the whole loop in seconds; it learns nothing."
    ),
    "gsm8k": Recipe("drpo.recipes.math", "A 0.5B model learns grade-school word problems; requires a GPU."),
    "drpo_paper": Recipe(
        "drpo.recipes.math",
        "The setting of the DRPO paper (arXiv 2606.09821): Qwen3-4B-Base on DAPO-Math; requires large GPUs.",
    ),
}


def require_recipe(name: str) -> None:
    """Raise unless a recipe has this name.

    Raises:
        InputError: none has; the nearest one is named.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")


def find(name: str) -> "Run":
    """Return the run that a recipe's name stands for.

    Raises:
        InputError: no recipe of this name; the nearest one is named.

    Example:
        >>> find("demo").name
        'demo'
    """
    require_recipe(name)
    run: Run = import_named(RECIPES[name].module, name, "recipe")()
    return run
