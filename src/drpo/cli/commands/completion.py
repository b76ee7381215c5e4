"""`drpo completion`: a script for the shell, made from the commands, the recipes and the dataclasses of the options."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from drpo.cli import COMMANDS
from drpo.cli.options import asks_for_help, flag, flags
from drpo.errors import InputError, nearest
from drpo.recipes import RECIPES
from drpo.spec import import_named
from drpo.train.fields import FIELDS

USAGE = """usage: drpo completion bash|zsh|fish

Print a script with which the shell completes the commands of drpo, the names of recipes, and options.

  drpo completion bash > ~/.local/share/bash-completion/completions/drpo

That of zsh goes into a file _drpo in a folder of your fpath, which is set before compinit; that of fish into
~/.config/fish/completions/drpo.fish.

Write it anew after an update of drpo. What it does not know it leaves to the shell: files.
"""

_COMMANDS = "drpo.cli.commands"
OPTIONS: Mapping[str, Sequence[str]] = {
    "train": tuple(f"{_COMMANDS}.train:{kind}Options" for kind in ("Train", "Data", "Resume", "From")),
    "sft": (f"{_COMMANDS}.sft:SFTOptions", f"{_COMMANDS}.sft:SFTResumeOptions"),
    "init": (f"{_COMMANDS}.init:InitOptions",),
    "watch": (f"{_COMMANDS}.watch:WatchOptions",),
    "eval": ("drpo.cli.eval_options:EvalOptions",),
    "chat": (f"{_COMMANDS}.chat:ChatOptions",),
    "serve": (f"{_COMMANDS}.serve:ServeOptions",),
    "export": (f"{_COMMANDS}.export:ExportOptions",),
    "verify": (),
    "report": (f"{_COMMANDS}.report:ReportOptions",),
    "doctor": (f"{_COMMANDS}.doctor:DoctorOptions",),
    "serve-rollouts": (f"{_COMMANDS}.serve_rollouts:ServeRolloutsOptions",),
    "compare": (f"{_COMMANDS}.compare:CompareOptions", f"{_COMMANDS}.compare:ResumeOptions"),
    "recipes": (),
    "weights": (f"{_COMMANDS}.weights:WeightsOptions",),
    "replay": (f"{_COMMANDS}.replay:ReplayOptions",),
    "autopsy": (f"{_COMMANDS}.autopsy:AutopsyOptions",),
    "explain": (f"{_COMMANDS}.explain:ExplainOptions",),
    "env": (f"{_COMMANDS}.env:EnvOptions",),
    "completion": (),
}
"""Command -> the dataclasses of its options; those of no dataclass are in `EXTRA_OPTIONS`."""
WITH_FIELDS = frozenset({"train", "doctor", "compare"})
"""Commands whose first argument is a recipe, and which take the fields of its run."""
EXTRA_OPTIONS: Mapping[str, Sequence[str]] = {
    "train": ("--resume", "--from", "--learning-rate", "--reward"),
    "sft": ("--resume",),
    "compare": ("--resume", "--learning-rate"),
    "doctor": ("--learning-rate",),
}


class Words(NamedTuple):
    """What may follow a command.

    Args:
        about: the command's line in `drpo --help`.
        first: names that its first argument may be, besides a file.
        options: that it takes, each with its dashes.
    """

    about: str
    first: Sequence[str]
    options: Sequence[str]


def words() -> Mapping[str, Words]:
    """Return what may follow each command."""
    found = {}
    for name, command in COMMANDS.items():
        options = {"--help", *EXTRA_OPTIONS.get(name, ())}
        for kind in OPTIONS[name]:
            module, _, options_of = kind.partition(":")
            options |= {option for option in flags(import_named(module, options_of, "command")) if option != "--"}
        options |= set(map(flag, FIELDS)) if name in WITH_FIELDS else set()
        first = list(RECIPES) if name in WITH_FIELDS else list(SHELLS) if name == "completion" else []
        found[name] = Words(next(iter(command.usage.values())), first, sorted(options))
    return found


def bash(commands: Mapping[str, Words]) -> str:
    """Return the script for bash."""
    cases = "\n".join(
        f"        {name}) first='{' '.join(of.first)}' options='{' '.join(of.options)}' ;;"
        for name, of in commands.items()
    )
    return f"""# The completion of drpo in bash: `drpo completion bash`
_drpo() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} first='' options=''
    if ((COMP_CWORD == 1)); then
        first='{" ".join(commands)}' options='--help --version'
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
        ((COMP_CWORD == 2)) || first=''
    fi
    [[ $cur == -* ]] && first=$options
    COMPREPLY=($(compgen -W "$first" -- "$cur"))
}}
complete -o bashdefault -o default -F _drpo drpo
"""


def zsh(commands: Mapping[str, Words]) -> str:
    """Return the script for zsh, to be sourced or as `_drpo` in a folder of fpath."""
    names = "\n".join(f"            {_quoted(f'{name}:{of.about}')}" for name, of in commands.items())
    cases = "\n".join(
        f"        {name}) first=({' '.join(of.first)}) options=({' '.join(of.options)}) ;;"
        for name, of in commands.items()
    )
    return f"""#compdef drpo
# The completion of drpo in zsh: `drpo completion zsh`
_drpo() {{
    local -a first options
    if (( CURRENT == 2 )); then
        first=(
{names}
        )
        [[ $PREFIX == -* ]] && compadd -- --help --version || _describe command first
        return
    fi
    case $words[2] in
{cases}
    esac
    if [[ $PREFIX == -* ]]; then
        compadd -- $options
    else
        (( CURRENT == 3 )) && compadd -- $first
        _files
    fi
}}
if [[ $funcstack[1] == _drpo ]]; then _drpo "$@"; else compdef _drpo drpo; fi
"""


def fish(commands: Mapping[str, Words]) -> str:
    """Return the script for fish."""
    lines = ["# The completion of drpo in fish: `drpo completion fish`"]
    for name, of in commands.items():
        lines.append(f"complete -c drpo -n __fish_use_subcommand -f -a {name} -d {_quoted(of.about)}")
        after = f"__fish_seen_subcommand_from {name}"
        if of.first:
            second = f"{after}; and test (count (commandline -opc)) -eq 2"
            lines.append(f"complete -c drpo -n '{second}' -a '{' '.join(of.first)}'")
        lines += [f"complete -c drpo -n '{after}' -l {option.removeprefix('--')}" for option in of.options]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text in single quotes, for zsh and fish: neither then reads anything in it."""
    return "'" + text.replace("\\", "").replace("'", "") + "'"


SHELLS: Mapping[str, Callable[[Mapping[str, Words]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def completion(arguments: list[str]) -> int:
    """`drpo completion bash|zsh|fish`."""
    if asks_for_help(arguments):
        print(USAGE)
        return 0
    if len(arguments) != 1:
        raise InputError(f"completion: name one shell: {', '.join(SHELLS)}")
    if arguments[0] not in SHELLS:
        raise InputError(f"completion {arguments[0]!r}: no such shell{nearest(arguments[0], SHELLS)}")
    print(SHELLS[arguments[0]](words()), end="")
    return 0
