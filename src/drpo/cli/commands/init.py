"""`drpo init`: its options."""

import os
from dataclasses import dataclass
from pathlib import Path

from drpo.cli.commands.train import require_data
from drpo.cli.options import parse
from drpo.errors import InputError
from drpo.recipes import is_recipe_file
from drpo.spec import import_named


@dataclass(frozen=True)
class InitOptions:
    """Write a recipe for your own questions and answers, and show what the model will read.

      drpo init my.jsonl --system 'Reply with a number.' --yes

    Asks for the data, the model, the columns, the system message, examples and the reward, each with a default; samples
    a hundred answers to see how long they get; writes the recipe, which is Python with comments; shows the first
    prompts exactly as the model will read them; and checks that the numbers are sound (`drpo doctor`, in short). Where
    there is no terminal nothing is asked.

    Args:
        model: smollm2-135m, a folder, or a hub id, owner/name.
        prompt_field: the column of the question; default: the one with a usual name.
        answer_field: the column of the answer; default: the one with a usual name.
        system: the system message; default: none, or one that asks for the form that the guessed reward reads.
        shots: the first rows become examples before every question; they are not trained on.
        reward: exact_number, exact_match, math_verify, or your own module:function; default: by the answers.
        out: the file to write; an existing file is not replaced.
        yes: ask nothing, take all defaults.
        doctor: check that the numbers are sound on this machine.
    """

    model: str = "smollm2-135m"
    prompt_field: str | None = None
    answer_field: str | None = None
    system: str | None = None
    shots: int = 0
    reward: str | None = None
    out: Path = Path("recipe.py")
    yes: bool = False
    doctor: bool = True


def init(arguments: list[str]) -> int:
    """`drpo init [FILE] [options]`."""
    named = bool(arguments) and not arguments[0].startswith("-")
    data, rest = (arguments[0], arguments[1:]) if named else (None, arguments)
    options = parse(InitOptions, rest, "drpo init [FILE]")
    if not is_recipe_file(options.out.name):
        raise InputError(f"--out {options.out}: a recipe is a file of Python; end its name in .py")
    if os.path.lexists(options.out):
        raise InputError(f"--out {options.out}: a file is there, which is not replaced; name another")
    if data is not None:
        require_data(data)
    return int(import_named("drpo.cli.init", "init", "command")(data, options))
