"""`drpo eval`: its first check. Its options are in `drpo.cli.eval_options`, which imports a run's records."""

from drpo.cli.options import asks_for_help, leading
from drpo.model.names import require_there
from drpo.spec import import_named
from drpo.train.records import is_run


def eval(arguments: list[str]) -> int:
    """`drpo eval MODEL|RUN [options]`."""
    name, rest = leading(arguments, "MODEL|RUN", "eval: name a model or a run's folder first")
    if not (asks_for_help(rest) or is_run(name)):
        require_there(name)
    asked = import_named("drpo.cli.eval_options", "read_options", "command")(name, rest)
    return int(import_named("drpo.cli.eval", "eval", "command")(name, *asked))
