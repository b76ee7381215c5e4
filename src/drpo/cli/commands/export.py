"""`drpo export`: its options."""

from dataclasses import dataclass
from pathlib import Path

from drpo.cli.options import asks_for_help, parse
from drpo.errors import InputError
from drpo.model.names import require_there
from drpo.spec import import_named
from drpo.train.records import METRICS

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ExportOptions:
    """Write the weights of a run, or of a model, as a folder that any transformers program reads.

      drpo export runs/demo exported --dtype bf16

    Args:
        step: of a run: the checkpoint after this many rollouts; 0 for the last.
        dtype: fp32 (as trained), bf16 or fp16.
        trust_remote_code: import the model that the run's configuration names as module:name; only for folders that
            you trust.
    """

    step: int = 0
    dtype: str = "fp32"
    trust_remote_code: bool = False


def export(arguments: list[str]) -> int:
    """`drpo export RUN|MODEL FOLDER [--step N] [--dtype D]`: a folder that any transformers program reads."""
    if asks_for_help(arguments):
        arguments = ["RUN|MODEL", "FOLDER", *arguments]
    if len(arguments) < 2 or any(a.startswith("-") for a in arguments[:2]):
        raise InputError("export: name a run or a model first, then the folder to write, then options")
    name, target, *rest = arguments
    options = parse(ExportOptions, rest, f"drpo export {name} {target}")
    if options.dtype not in DTYPES:
        raise InputError(f"export: --dtype {options.dtype!r}: must be one of {', '.join(DTYPES)}")
    if not (Path(name) / METRICS).exists():
        require_there(name)
    return int(import_named("drpo.cli.export", "export", "command")(name, target, options))
