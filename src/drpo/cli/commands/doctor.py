"""`drpo doctor`: its options."""

from dataclasses import dataclass

from drpo.cli.options import asks_for_help, parse, require_options
from drpo.errors import as_typed
from drpo.recipes import require_recipe
from drpo.spec import import_named


@dataclass(frozen=True)
class DoctorOptions:
    """Check that a run's numbers are sound on this machine: a line per check, in a minute. Nothing is trained.

      drpo doctor demo --precision bf16

    The exit status is 1 if something is broken.

    Args:
        method: as a paper does: grpo, dapo, ppo, ...; `drpo train RECIPE --help` says what each sets.
        quick: the short form, with which every training run begins.
        json: print the findings as JSON.
    """

    method: str | None = None
    quick: bool = False
    json: bool = False


def doctor(arguments: list[str]) -> int:
    """`drpo doctor [RECIPE] [overrides]`; returns 1 if something is broken."""
    named = bool(arguments) and not arguments[0].startswith("-")
    if not named and asks_for_help(arguments):
        more = "RECIPE is a name or a file of yours; demo without one. `drpo doctor RECIPE --help` shows all fields."
        parse(DoctorOptions, arguments, "drpo doctor [RECIPE]", more=more)
    recipe, rest = (arguments[0], arguments[1:]) if named else ("demo", arguments)
    require_recipe(recipe)
    prog = f"drpo doctor {as_typed(recipe)}"
    require_options(rest, DoctorOptions, prog)
    run, options = import_named("drpo.cli.overrides", "recipe_run", "command")(recipe, rest, prog, DoctorOptions)
    return int(import_named("drpo.cli.doctor", "doctor", "command")(recipe, run, options))
