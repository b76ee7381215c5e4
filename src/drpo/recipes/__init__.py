"""Recipes by name: functions that return a `Run`, imported on demand."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from drpo.errors import InputError, nearest
from drpo.spec import import_named

if TYPE_CHECKING:
    from drpo.train.config import Run


class Recipe(NamedTuple):
    """A recipe that is imported on demand.

    Args:
        module: the module with the function of the recipe's name.
        about: its line in `drpo recipes`.
    """

    module: str
    about: str


RECIPES: Mapping[str, Recipe] = {
    "demo": Recipe("drpo.recipes.addition", "SmolLM2-135M learns to add with DRPO, on a laptop's CPU, in minutes."),
    "smoke": Recipe(
        "drpo.recipes.addition", "A random two-layer model goes through the whole loop in seconds; it learns nothing."
    ),
    "calculator": Recipe(
        "drpo.recipes.agents", "SmolLM2-135M learns to use a calculator for products of two factors, in minutes."
    ),
    "calculator_twice": Recipe(
        "drpo.recipes.agents", "SmolLM2-135M learns to use a calculator twice, for products of three factors."
    ),
    "guess": Recipe("drpo.recipes.agents", 'SmolLM2-135M learns to guess a number by "higher" and "lower".'),
    "gsm8k": Recipe("drpo.recipes.math", "A 0.5B model learns grade-school word problems; requires a GPU."),
    "drpo_paper": Recipe(
        "drpo.recipes.math",
        "The setting of the DRPO paper (arXiv 2606.09821): Qwen3-4B-Base on DAPO-Math; requires large GPUs.",
    ),
}


def require_recipe(name: str) -> None:
    """Raise unless a recipe has this name.

    Raises:
        InputError: no recipe of this name; the message suggests the nearest.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")


def find(name: str) -> "Run":
    """Return the run of a recipe.

    Raises:
        InputError: no recipe of this name; the message suggests the nearest.

    Example:
        >>> find("demo").name
        'demo'
    """
    require_recipe(name)
    run: Run = import_named(RECIPES[name].module, name, "recipe")()
    return run
