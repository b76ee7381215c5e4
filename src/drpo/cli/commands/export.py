"""`drpo export`: its options."""

from dataclasses import dataclass
from pathlib import Path

from drpo.cli.options import asks_for_help, parse
from drpo.errors import InputError, as_typed
from drpo.model.names import require_there
from drpo.spec import import_named
from drpo.train.records import is_run

DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ExportOptions:
    """Write the weights of a run, or of a model, as a folder that any transformers program reads.

      drpo export runs/demo exported --dtype bf16
      drpo export runs/demo demo.gguf --gguf --dtype bf16

    Args:
        step: of a run: the checkpoint after this many rollouts; 0 for the last.
        dtype: fp32 (as trained), bf16 or fp16.
        adapter: of a run with --lora-rank: the adapter alone, in PEFT's format, for the model that the run began with.
        gguf: one file, NAME.gguf, which llama.cpp and what is built on it read; Llama (SmolLM2), Qwen2 and Qwen3.
        push: upload what was written to this repository of the Hugging Face hub, owner/name; a new one is private.
        public: a new repository is public.
        overwrite: a repository that has files may get these too.
        trust_remote_code: import the model that the run's configuration names as module:name; only for folders that
            you trust.
    """

    step: int = 0
    dtype: str = "fp32"
    adapter: bool = False
    gguf: bool = False
    push: str | None = None
    public: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False


def export(arguments: list[str]) -> int:
    """`drpo export RUN|MODEL FOLDER|FILE [options]`."""
    if asks_for_help(arguments):
        arguments = ["RUN|MODEL", "FOLDER", *arguments]
    if len(arguments) < 2 or any(a.startswith("-") for a in arguments[:2]):
        raise InputError("export: name a run or a model first, then the folder to write, then options")
    name, target, *rest = arguments
    options = parse(ExportOptions, rest, f"drpo export {as_typed(name)} {as_typed(target)}")
    require_consistent(name, target, options)
    if not is_run(name):
        require_there(name)
        if options.adapter:
            raise InputError(f"export: --adapter: {name} is not a run of drpo, so there is no adapter apart from it")
    return int(import_named("drpo.cli.export", "export", "command")(name, target, options))


def require_consistent(name: str, target: str, options: ExportOptions) -> None:
    """Raise for options that do not go together.

    Args:
        name: the run's folder, or the model.
        target: the folder or the file to write.
        options: the options.
    """
    if options.dtype not in DTYPES:
        raise InputError(f"export: --dtype {options.dtype!r}: must be one of {', '.join(DTYPES)}")
    if options.adapter and options.gguf:
        raise InputError("export: --adapter and --gguf are two files; write one after the other")
    if options.gguf != (Path(target).suffix == ".gguf"):
        raise InputError(f"export: {target}: --gguf writes a file that ends in .gguf, everything else a folder")
    for option, given in (("--public", options.public), ("--overwrite", options.overwrite)):
        if given and options.push is None:
            raise InputError(f"export: {option} says how to upload; add --push owner/name")
