"""The implementation of `drpo train --from`: a new run from the weights of another."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from drpo.cli.commands.train import FromOptions
from drpo.cli.folder import CODE, at_server, open_run
from drpo.cli.overrides import OF_THE_RUN, changes
from drpo.cli.train import begin
from drpo.cli.trained import trained, weights_of
from drpo.model.saving import save_model
from drpo.train.config import Run, configure, load_run
from drpo.train.log import write_json
from drpo.train.origin import ORIGIN, START, Origin, read_origin
from drpo.train.stored import write_sums


def begin_from(source: Path, step: int, arguments: list[str], prog: str) -> int:
    """Train a new run from the weights of another; called in every process.

    Args:
        source: folder of the other run.
        step: the checkpoint after so many steps; 0 for the newest weights.
        arguments: of the command line.
        prog: the command's name, for messages.
    """
    described = _without_warm_up(load_run(source, trust_remote_code=False))
    given, options = changes(described, arguments, prog, FromOptions, without=("model",), about=OF_THE_RUN)
    base = open_run(source, options.trust_remote_code, needed=[name for name in CODE if name not in given])
    run = configure(_without_warm_up(_sampled_with(base, source, options.engine)), **given)
    weights_of(source, step, f"--from {source}")
    return begin(run, options, partial(write_start, source, step, options.trust_remote_code))


def _without_warm_up(run: Run) -> Run:
    """Return the run without the warm-up that its weights come from."""
    return configure(run, warm_up=None)


def _sampled_with(run: Run, source: Path, engine: str | None) -> Run:
    """Return the run with the engine that the command names; a server that only the folder names is refused."""
    return at_server(run, source, None) if engine is None else configure(run, engine=engine)


def write_start(source: Path, step: int, trust_remote_code: bool, folder: Path) -> None:
    """Write the weights that a new run begins with into its folder, and where they come from.

    Args:
        source: folder of the other run.
        step: as for `begin_from`.
        trust_remote_code: import the model that the other run names as module:name.
        folder: of the new run.
    """
    option = f"--from {source}"
    origin = Origin(str(source.resolve()), weights_of(source, step, option)[1])
    if (folder / START).is_dir() and read_origin(folder) == origin:  # the same command once more
        return
    save_model(*trained(source, step, trust_remote_code, option), folder / START)
    write_sums(folder / START)
    write_json(folder / ORIGIN, asdict(origin))
