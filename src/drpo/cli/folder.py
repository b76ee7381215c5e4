"""Opens untrusted run folders: reads them without running their code, and reports errors in one line."""

from collections.abc import Collection
from pathlib import Path

from drpo.credentials import without_password
from drpo.errors import InputError
from drpo.spec import contacts, runs_code
from drpo.train.config import REGISTRIES, Run, configure, flat_json, load_run
from drpo.train.fields import FIELDS
from drpo.train.records import CONFIG

CODE = (*REGISTRIES, "model")
"""Fields that may name code."""


def open_run(folder: Path, trust_remote_code: bool, needed: Collection[str] = CODE) -> Run:
    """Return the run of an untrusted folder.

    Args:
        folder: of the run.
        trust_remote_code: import the fields of its configuration whose spec is `module:name`.
        needed: the fields that the command requires.

    Raises:
        InputError: a needed field is code, and `trust_remote_code` is False.
    """
    run = load_run(folder, trust_remote_code)
    code = {} if trust_remote_code else external_code(run)
    for name in needed:
        if name in code:
            does = "run code" if runs_code(code[name]) else "send texts to an address"
            raise InputError(
                f"{folder / CONFIG}: {FIELDS[name]}={without_password(code[name])!r} would {does} that this folder "
                "names; where you trust it, add --trust-remote-code"
            )
    return run


def at_server(run: Run, folder: Path, engine: str | None) -> Run:
    """Return the run with the server that the command names; a server named only by the folder is rejected.

    Args:
        run: of the folder.
        folder: the untrusted folder.
        engine: the address from `--engine`, or None.

    Raises:
        InputError: only one of folder and command names a server.
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
    """Return the fields of a run that name code to import, or an address that a reward asks: name -> spec."""
    specs = {name: text for name, text in flat_json(run).items() if name in CODE and text is not None}
    return {name: text for name, text in specs.items() if runs_code(text) or (name == "reward" and contacts(text))}


def resume_flag(run: Run) -> str:
    """Return the flags that resuming this run requires after the folder."""
    engine = f" --engine {run.rollout.engine}" if run.rollout.engine.startswith("http") else ""
    return f"{' --trust-remote-code' if external_code(run) else ''}{engine}"
