"""A run on a user's own data from the command line: `drpo train --data`."""

from drpo.cli.commands.train import DataOptions
from drpo.cli.options import given, option_value
from drpo.cli.overrides import overridden
from drpo.errors import InputError
from drpo.ranks import is_distributed
from drpo.recipes.own_data import OwnData, measured_changes, neutral, read_own
from drpo.train.config import Run, configure


def own_run(arguments: list[str], prog: str) -> tuple[Run, DataOptions]:
    """Return the run of `drpo train --data FILE` with the command line's overrides, and the other options.

    Args:
        arguments: of the command line.
        prog: the command's name, for messages.

    Raises:
        InputError: the data cannot be used, or an option or its value.
    """
    if is_distributed():
        raise InputError("--data: several processes cannot all guess; write a recipe first: drpo init FILE")
    settings = {name: option_value(arguments, name) for name in ("prompt_field", "answer_field", "system", "reward")}
    data = OwnData(str(option_value(arguments, "data")), **settings, shots=_number(arguments, "shots"))
    base = neutral(read_own(data))
    run, _ = overridden(base, arguments, prog, DataOptions, without=("task",))
    base = configure(base, **measured_changes(run, given(arguments)))
    return overridden(base, arguments, prog, DataOptions, without=("task",))  # a --method reads what was measured


def _number(arguments: list[str], name: str) -> int:
    text = option_value(arguments, name) or "0"
    if not text.isdecimal():
        raise InputError(f"--{name} {text!r}: must be a whole number, 0 or more")
    return int(text)
