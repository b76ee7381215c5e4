"""Folders that someone else may have made: what they hold is read without running it, and what is wrong named."""

from collections.abc import Collection
from pathlib import Path

from drpo.errors import InputError
from drpo.spec import names_code
from drpo.train.config import REGISTRIES, Run, configure, flat_json, load_run
from drpo.train.fields import FIELDS
from drpo.train.records import CONFIG

CODE = (*REGISTRIES, "model")
"""The fields that may name code."""


def open_run(folder: Path, trust_remote_code: bool, needed: Collection[str] = CODE) -> Run:
    """Return the run of a folder that someone else may have made.

    Args:
        folder: of the run.
        trust_remote_code: import the fields of its configuration whose spec is `module:name`.
        needed: the fields that the command cannot do without.

    Raises:
        InputError: a needed field is code, and the command did not say that it may run.
    """
    run = load_run(folder, trust_remote_code)
    code = {} if trust_remote_code else external_code(run)
    for name in needed:
        if name in code:
            raise InputError(
                f"{folder / CONFIG}: {FIELDS[name]}={code[name]!r} would run code that this folder names; "
                "where you trust it, add --trust-remote-code"
            )
    return run


def at_server(run: Run, folder: Path, engine: str | None) -> Run:
    """Return the run of a folder with the server that the command names; none that only the folder names.

    Args:
        run: of the folder.
        folder: that may be someone else's.
        engine: the address that the command gives, `--engine`, or None.

    Raises:
        InputError: the folder names a server and the command does not, or the other way round.
    """
    if not run.rollout.engine.startswith("http"):
        if engine is not None:
            raise InputError(f"--engine {engine}: this run samples with {run.rollout.engine}; leave the option out")
        return run
    if engine is None:
        raise InputError(
            f"{folder / CONFIG}: rollout.engine={run.rollout.engine!r} is an address that this folder names; "
            f"where you trust it, add --engine {run.rollout.engine}"
        )
    if not engine.startswith("http"):
        raise InputError(f"--engine {engine}: this run samples with a server; give its address, http://host:port")
    return configure(run, engine=engine)


def external_code(run: Run) -> dict[str, str]:
    """Return the fields of a run that name code to import: name -> spec."""
    specs = {name: text for name, text in flat_json(run).items() if name in CODE and text is not None}
    found = {name: text for name, text in specs.items() if names_code(text)}
    for name, task in (("task", run.data.task), ("eval_task", run.evaluation.task)):
        reward = getattr(task, "reward_name", "")
        if names_code(reward):
            found[name] = reward
    return found


def resume_flag(run: Run) -> str:
    """Return what a command that goes on with this run needs behind the folder."""
    engine = f" --engine {run.rollout.engine}" if run.rollout.engine.startswith("http") else ""
    return f"{' --trust-remote-code' if external_code(run) else ''}{engine}"
