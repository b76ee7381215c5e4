"""Recipes by name, and of Python files: functions that return a `Run`, imported on demand."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from drpo.errors import InputError, as_typed, nearest
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


DATA = (".jsonl", ".json", ".csv", ".parquet")
"""Suffixes of data, which is no recipe."""


def is_recipe_file(name: str) -> bool:
    """Whether a recipe is named by its file, `my_recipe.py`.

    Example:
        >>> is_recipe_file("recipes/sums.py"), is_recipe_file("demo")
        (True, False)
    """
    return name.endswith(".py")


def require_recipe(name: str) -> None:
    """Raise unless a recipe has this name, or a file of this name holds Python; no code of it runs.

    Raises:
        InputError: no recipe of this name (the message suggests the nearest), no such file, or its syntax is wrong.
    """
    if is_recipe_file(name):
        _require_python(Path(name))
    elif name not in RECIPES:
        files = [f"{name}.py"] if Path(f"{name}.py").is_file() else []
        on_data = f"; for data write: drpo train --data {as_typed(name)}"
        hint = on_data if name.endswith(DATA) else nearest(name, files or RECIPES)
        raise InputError(f"unknown recipe {name!r}{hint}")


def _require_python(path: Path) -> None:
    try:
        ast.parse(path.expanduser().read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a file of Python that has a function recipe()") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(f"{path}{line}: no Python that can be read: {reason}") from None


def find(name: str) -> "Run":
    """Return the run of a recipe, by its name or its file.

    Raises:
        InputError: no such recipe (`require_recipe`), or a file without a recipe that works.

    Example:
        >>> find("demo").name
        'demo'
    """
    require_recipe(name)
    if is_recipe_file(name):
        of_file: Run = import_named("drpo.recipes.files", "run_of_file", "recipe")(Path(name).expanduser())
        return of_file
    run: Run = import_named(RECIPES[name].module, name, "recipe")()
    return run
